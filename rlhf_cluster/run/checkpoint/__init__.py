"""Checkpoints of a run: one consistent cut between two steps, and how a run goes on from it."""
