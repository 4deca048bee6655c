"""Users' models: calling them, trees of tensors, surgery, and modules that work with fewer channels."""
