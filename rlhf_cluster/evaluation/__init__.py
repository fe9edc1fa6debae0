"""Evaluation on held-out prompts: when, on which version, and what is recorded of it."""
