"""Bytes, contents and places of checkpoints."""
