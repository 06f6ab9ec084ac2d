"""Training: the loop, optimizers, averages, checkpoints."""
