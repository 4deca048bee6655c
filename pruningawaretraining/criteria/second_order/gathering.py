"""Statistics for criteria that listen to training (SNIP, Taylor, Wanda, variances ...), where nothing is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from pruningawaretraining.criteria.base import Statistics, collector_of
from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.distributed.collectives import average_gradients
from pruningawaretraining.errors import ModelError
from pruningawaretraining.groups.grouping import Grouping

BATCHES = 64
"""Micro-batches that such a criterion listens to."""


def unchanged_copy(model: nn.Module) -> nn.Module:
    """A deep copy; gradients are not copied.

    Raises:
        ModelError: it cannot be copied.
    """
    memo: dict[int, Any] = {id(p.grad): None for p in model.parameters() if p.grad is not None}
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"model: it cannot be copied: {' '.join(str(error).split())}") from error


def on_model(calibration: Calibration, model: nn.Module) -> Calibration:
    """The same data and loss, for another model."""
    return Calibration(model, calibration.dataloader, calibration.loss_fn, calibration.micro_batch)


def gathered(
    calibration: Calibration, group: Callable[[nn.Module], Grouping], criterion: Any
) -> tuple[Grouping, Statistics]:
    """A model's groups, and what a criterion needs to score them: listened to on a copy, so that the model keeps its
    gradients. Criteria that look at weights alone need no data. Several processes listen to their own data together.

    Args:
        calibration: the model and the data.
        group: labels a model.
        criterion: what will score.
    """
    collector = collector_of(criterion)
    if collector is None:
        return group(calibration.model), Statistics()
    stage = unchanged_copy(calibration.model)
    grouping = group(stage)
    collector.attach(stage, grouping)

    def listen() -> None:
        average_gradients(stage)
        collector.on_before_step(grouping)

    try:
        on_model(calibration, stage).each_backward(BATCHES, listen)
        collector.agree()
        return grouping, Statistics(tensors=collector.tensors())
    finally:
        collector.detach()
