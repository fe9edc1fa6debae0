"""Making data sets: prompts are sampled and scored by the pools, and what is selected becomes rows."""
