"""Text from a model, as token ids: how the next token is drawn, and how many rows are decoded together."""
