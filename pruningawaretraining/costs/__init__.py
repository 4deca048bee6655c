"""Costs of a set of masks."""
