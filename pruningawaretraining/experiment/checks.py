"""Checks before a run starts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pruningawaretraining.distributed.collectives import world_size
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.experiment.schema import ExperimentConfig
from pruningawaretraining.experiment.train import scores_of
from pruningawaretraining.models.calling import checked_call, evaluating


def check_share(size: int) -> None:
    """Refuse batches that cannot be shared out equally: gradients are averaged over processes.

    Raises:
        ConfigError: ``size`` images are no multiple of the processes.
    """
    if size % world_size():
        raise ConfigError(
            f"batch_size: {size} images cannot be shared by {world_size()} processes. Allowed: a multiple"
        )


def check_scores(model: nn.Module, images: Tensor, classes: int) -> None:
    """Refuse a model that does not give a score for every class.

    Raises:
        ConfigError: it gives fewer.
    """
    with torch.no_grad(), evaluating(model):
        found = scores_of(checked_call(model, images)).shape[1]
    if found < classes:
        raise ConfigError(f"model.kwargs: the model gives {found} scores. Allowed: one for each of {classes} classes")


def late_ends(config: ExperimentConfig, steps: int) -> Iterator[str]:
    """A warning for each rule whose last event lies after the training, so that its target is not met.

    Args:
        config: the experiment.
        steps: batches in an epoch.
    """
    for number, rule in enumerate(config.pruning.rules):
        last = config.epochs * (steps if rule.unit == "step" else 1) - (config.prune_at == "end")
        end = rule.start if rule.end is None else rule.end
        if rule.enabled and end == last and config.pruning.recovery is not None and config.pruning.recovery.follows:
            key = rule.name or f"pruning.rules[{number}]"
            yield f"{key}.end: {end} is the last {rule.unit}: no epoch is left for the recovery after pruning"
        if rule.enabled and end > last:
            key = rule.name or f"pruning.rules[{number}]"
            yield f"{key}.end: {end} lies after the last {rule.unit}, {last}: the target will not be reached"
