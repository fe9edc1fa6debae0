"""Learner ranks: training step, critic, sharding, publishing. They know no algorithm by name.

This package imports none of its modules.
"""
