"""Turns text into batches, and tells where training stands in them."""
