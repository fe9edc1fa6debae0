"""Data sets, prompts, tasks and tokenizers. Importing it loads neither torch nor transformers."""
