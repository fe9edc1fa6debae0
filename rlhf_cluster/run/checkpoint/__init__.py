"""Checkpoints of a run: consistent snapshots between two steps, and resuming from them."""
