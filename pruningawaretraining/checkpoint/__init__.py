"""Checkpoints of pruned models, and plain state dicts loaded by shapes."""
