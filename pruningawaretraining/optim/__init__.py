"""The proximal optimizer, where users of ``pat.optim`` look for it."""

from pruningawaretraining.config.dialects.pat import prune_param_groups
from pruningawaretraining.proximal import LambdaController, PruneOptimizer

__all__ = ["LambdaController", "PruneOptimizer", "prune_param_groups"]
