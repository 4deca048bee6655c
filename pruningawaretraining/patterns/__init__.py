"""Patterns: weights that are pruned together. Each builds groupings for a model."""
