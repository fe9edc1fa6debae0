"""The versioned weight store, and the overlap of publishing with training."""
