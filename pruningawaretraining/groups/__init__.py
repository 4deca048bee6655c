"""Groupings label weights; sums over groups and their adjoint, with fast paths."""
