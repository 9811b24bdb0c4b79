"""Wiring of one run: folder, environment, trainer, checkpoints, logs and the guards around them."""
