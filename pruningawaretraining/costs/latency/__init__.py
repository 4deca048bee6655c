"""Latency as a cost: tables of measured layers, the model that adds them up, the meter."""
