"""Translates other people's names for the same weights: a file a kind of network."""
