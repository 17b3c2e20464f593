"""Training data: shards of images, and the batches made from them."""
