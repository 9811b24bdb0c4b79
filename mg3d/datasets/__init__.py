"""Samples: from an Arrow row to tensors; nothing here imports Lightning or the config."""
