"""Epochs that a pruned model can be trained in the time that its faster steps save."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pruningawaretraining.errors import ConfigError
from pruningawaretraining.models.calling import device_of

ROUNDING = 1e-9


def epochs_for_time(left: int, dense: float, pruned: float) -> int:
    """Epochs of a pruned model that cost no more than the epochs that are left would cost the dense one.

    Args:
        left: epochs.
        dense, pruned: what an epoch, or a step, of each costs: seconds, or MACs.

    Returns:
        Whole epochs, ``left`` at least.

    Raises:
        ConfigError: a cost that is not above 0.
    """
    for name, value in (("dense", dense), ("pruned", pruned)):
        if not 0 < value < math.inf:
            raise ConfigError(f"{name}: {value!r} is not allowed. Allowed: a number above 0")
    return max(left, math.floor(left * dense / pruned + ROUNDING))


def step_seconds(
    models: Mapping[str, nn.Module], loss: Callable[[nn.Module], Tensor], repeats: int = 5, warmup: int = 2
) -> dict[str, float]:
    """Median seconds of a forward and a backward pass of each model; they take turns.

    Args:
        models: in training mode, for the time being; give copies, for their gradients and statistics change.
        loss: runs a model and gives what is differentiated.
        repeats, warmup: passes that count, and those before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(warmup + repeats):
        for name, model in models.items():
            model.train()
            _wait(model)
            started = time.perf_counter()
            torch.autograd.backward(loss(model))
            _wait(model)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in seconds.items()}


def _wait(model: nn.Module) -> None:
    device = device_of(model)
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
