"""How ranks share one model, for any LightningModule."""
