"""Which channels belong together, followed through the operations of one forward pass."""
