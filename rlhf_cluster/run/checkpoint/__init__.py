"""Checkpoints of a run: one consistent snapshot between two steps, and how a run resumes from it."""
