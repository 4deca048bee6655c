"""What a set of masks costs."""
