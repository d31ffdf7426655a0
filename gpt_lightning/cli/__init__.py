"""Makes objects of words, and of each error one line."""
