"""A run: rounds of train, score, prune and rewind."""
