"""From batches to updates: loss, perplexity, optimizer, and the LightningModule that joins them."""
