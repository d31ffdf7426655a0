"""The arithmetic of a torch expression, faster on some device; tests hold each to that expression."""
