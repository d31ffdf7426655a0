"""What happens around the steps: checkpoints, throughput, samples, progress, predictions."""
