"""Patterns: which weights live or die together. Each makes groupings for a model."""
