"""The training step, optimizers, checkpoints, and the loop over them."""
