"""Experiments that take seconds."""

from __future__ import annotations

import copy
from typing import Any

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "name": "pruningawaretraining.experiment.models:DigitsResNet",
        "kwargs": {"widths": [8, 16], "blocks": 1},
    },
    "data": {"name": "digits", "train_fraction": 0.25, "crop": 1},
    "epochs": 4,
    "batch_size": 64,
    "threads": 1,
    "device": "cpu",
    "optimizer": {"name": "SGD", "lr": 0.1, "kwargs": {"momentum": 0.9}},
    "pruning": {
        "rules": [
            {
                "regularizer": {"type": "growing_l2", "strength": 1e-3},
                "start": 1,
                "end": 2,
                "target": {"macs": 0.6},
                "final_sparsity": 0.3,
            }
        ]
    },
    "latency": {"repeats": 3, "warmup": 1},
    "onnx": {"exporter": "torchscript"},
}


def tiny(**changes: Any) -> dict[str, Any]:
    """The tiny experiment with some keys replaced; a mapping is merged into the one that is there."""
    config = copy.deepcopy(TINY)
    for key, value in changes.items():
        merge = isinstance(value, dict) and isinstance(config.get(key), dict) and key != "pruning"
        config[key] = {**config[key], **value} if merge else value
    return config
