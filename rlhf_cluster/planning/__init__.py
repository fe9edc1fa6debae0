"""What a run needs of a cluster, as pure functions."""
