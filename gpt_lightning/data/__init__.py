"""Text to batches: documents, tokenizer, token cache, sample order, and the datamodule that joins them."""
