"""Decides at every event which groups stay, and applies it."""
