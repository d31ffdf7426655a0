"""Tensor parallelism on top of DistributedDataParallel, for any LightningModule that names a plan."""
