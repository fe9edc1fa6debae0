"""Learner ranks: training step, critic, sharding, publishing. No algorithm is known by name.

This package imports none of its modules.
"""
