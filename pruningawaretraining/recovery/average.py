"""Averages of a model's weights over the last part of a training, and norms measured anew for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from pruningawaretraining.criteria.second_order.channels import recalibrate_norms
from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.errors import ConfigError, unknown
from pruningawaretraining.models.calling import unwrap

KINDS: dict[str, Callable[[float], Any]] = {
    "ema": get_ema_multi_avg_fn,
    "swa": lambda decay: get_swa_multi_avg_fn(),  # type: ignore[no-untyped-call]  # Izmailov et al. 2018
}


def averaged(model: nn.Module, kind: str = "ema", decay: float = 0.999) -> AveragedModel:
    """An average of the weights that a model has from now on; ``average.update_parameters(model)`` adds them.

    Begin it when channels have gone. The first update takes the weights as they are.

    Args:
        model: in training.
        kind: "ema", a moving average, to be updated after every step; or "swa", the mean, after every epoch.
        decay: of "ema": the part of the average that stays at an update, in [0, 1].

    Raises:
        ConfigError: another kind or decay.
    """
    if isinstance(decay, bool) or not 0 <= decay <= 1:
        raise ConfigError(f"decay: {decay!r} is not allowed. Allowed: a number in [0, 1]")
    if kind not in KINDS:
        raise ConfigError(unknown("kind", kind, KINDS))
    return AveragedModel(unwrap(model), multi_avg_fn=KINDS[kind](decay))


@torch.no_grad()
def take_average(model: nn.Module, average: AveragedModel) -> None:
    """Give a model the averaged weights. What is exactly 0 in the model, as masked weights are, stays 0.

    Norms keep the statistics of the last weights; :func:`measure_norms` measures them anew.

    Args:
        model: that was averaged; changed in place.
        average: of :func:`averaged`, or another ``AveragedModel`` of the model.

    Raises:
        ConfigError: the average is of another model, or older than a removal.
    """
    pairs = list(zip(unwrap(model).parameters(), average.module.parameters(), strict=False))
    theirs = [tuple(one.shape) for one in average.module.parameters()]
    if [tuple(one.shape) for one in unwrap(model).parameters()] != theirs:
        raise ConfigError(
            "average: its weights have other shapes than the model's. Allowed: an average started after the removal"
        )
    for weight, mean in pairs:
        weight.copy_(torch.where(weight == 0, weight, mean.to(weight.dtype)))


def measure_norms(model: nn.Module, batches: Iterable[Any], count: int = 100) -> int:
    """Measure the running statistics of every batch norm anew, as plain means over batches.

    Args:
        model: whose weights have changed; weights, modes and random states stay.
        batches: augmented training batches, each ``(inputs, targets)``: a norm that was trained on augmented images
            does not fit plain ones.
        count: how many of them.

    Returns:
        The number of norms.

    Raises:
        ConfigError: there are no batches.
    """
    return recalibrate_norms(unwrap(model), Calibration(unwrap(model), batches, _no_loss), count)


def _no_loss(outputs: Any, targets: Any) -> Tensor:
    raise AssertionError("norms are measured without a loss")
