"""The proximal optimizer, where users of ``pat.optim`` look for it."""

from pruningawaretraining.proximal import LambdaController, PruneOptimizer

__all__ = ["LambdaController", "PruneOptimizer"]
