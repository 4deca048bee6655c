"""A ``PruningCallback`` for each of Lightning, transformers' Trainer, Accelerate and ultralytics; see
docs/integrations.md.
"""
