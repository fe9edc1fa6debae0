"""The scoring pool's core: rewards, the reference, and log-probabilities under published versions.

Importing this package does not load torch.
"""
