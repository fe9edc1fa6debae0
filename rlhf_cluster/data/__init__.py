"""Prompts, tasks and tokenizers. Importing this package loads no torch and no transformers."""
