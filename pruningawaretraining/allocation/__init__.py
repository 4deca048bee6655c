"""Scores, limits and a target give the groups to keep."""
