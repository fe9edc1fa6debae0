"""What a run shows of itself: metrics, the run's log, samples, pictures and the live view."""
