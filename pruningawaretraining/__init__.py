"""Prune PyTorch models while they train.

``Pruning(model, config)`` and a few hook calls regularise, score, mask and finally remove channels; see the README.
"""

from pruningawaretraining.checkpoint.pruned import load_pruned, save_pruned
from pruningawaretraining.checkpoint.state_dict import load_state_dict_pruned
from pruningawaretraining.config import PruningConfig, load_config
from pruningawaretraining.costs.macs import count_macs
from pruningawaretraining.criteria import (  # noqa: F401  (importing them registers the criteria)
    activation,
    cost_aware,
    depth,
    geometric,
    gradient,
    magnitude,
    second_order,
)
from pruningawaretraining.export.onnx import export_onnx
from pruningawaretraining.export.semi_structured import to_semi_structured
from pruningawaretraining.masks.element_penalties import BlockLasso as _BlockLasso  # noqa: F401  (registers them)
from pruningawaretraining.patterns import block, slice  # noqa: F401  (importing them registers the patterns)
from pruningawaretraining.proximal import PruneOptimizer
from pruningawaretraining.registry import register
from pruningawaretraining.runtimes.timing import measure_latency
from pruningawaretraining.session.distillation import Distiller
from pruningawaretraining.session.one_shot import one_shot
from pruningawaretraining.session.pruner import Pruner
from pruningawaretraining.session.pruning import Pruning
from pruningawaretraining.version import __version__

__all__ = [
    "Distiller",
    "PruneOptimizer",
    "Pruner",
    "Pruning",
    "PruningConfig",
    "__version__",
    "count_macs",
    "export_onnx",
    "load_config",
    "load_pruned",
    "load_state_dict_pruned",
    "measure_latency",
    "one_shot",
    "register",
    "save_pruned",
    "to_semi_structured",
]
