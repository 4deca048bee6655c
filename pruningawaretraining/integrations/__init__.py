"""A ``PruningCallback`` for each of Lightning, transformers' Trainer and Accelerate; see docs/integrations.md."""
