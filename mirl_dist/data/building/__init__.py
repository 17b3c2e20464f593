"""Building and checking shards from folders of images."""
