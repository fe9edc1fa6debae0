"""Needs of a run: bundles, memory, inputs and transport, and whether a machine or cluster fits."""
