"""Prune PyTorch models while they train.

``Pruning(model, config)`` and a few hook calls regularise, score, mask and finally remove channels; see the README.

Public names are imported when first asked for, so that ``import pruningawaretraining`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pruningawaretraining.one_shot import one_shot
from pruningawaretraining.registry import register
from pruningawaretraining.version import __version__

if TYPE_CHECKING:
    from pruningawaretraining.checkpoint.pruned import load_pruned, save_pruned
    from pruningawaretraining.checkpoint.shortened import shortened
    from pruningawaretraining.checkpoint.state_dict import load_state_dict_pruned
    from pruningawaretraining.config import PruningConfig, load_config
    from pruningawaretraining.costs.macs import count_macs
    from pruningawaretraining.export.onnx import export_onnx
    from pruningawaretraining.export.semi_structured import to_semi_structured
    from pruningawaretraining.proximal import PruneOptimizer
    from pruningawaretraining.runtimes.timing import measure_latency
    from pruningawaretraining.session.distillation import Distiller
    from pruningawaretraining.session.pruner import Pruner
    from pruningawaretraining.session.pruning import Pruning

_WHERE = {
    "Distiller": "session.distillation",
    "PruneOptimizer": "proximal",
    "Pruner": "session.pruner",
    "Pruning": "session.pruning",
    "PruningConfig": "config",
    "count_macs": "costs.macs",
    "export_onnx": "export.onnx",
    "load_config": "config",
    "load_pruned": "checkpoint.pruned",
    "load_state_dict_pruned": "checkpoint.state_dict",
    "measure_latency": "runtimes.timing",
    "save_pruned": "checkpoint.pruned",
    "shortened": "checkpoint.shortened",
    "to_semi_structured": "export.semi_structured",
}

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
    "shortened",
    "to_semi_structured",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
