"""Text to batches, and where training stands in them."""
