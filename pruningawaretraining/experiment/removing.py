"""Changes of a run's model: the first time that something is removed, it is compared with the masked model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from pruningawaretraining.config.recovery import for_pruner
from pruningawaretraining.experiment.schema import ExperimentConfig
from pruningawaretraining.experiment.state import RunState
from pruningawaretraining.experiment.verify import difference, masked_scores, scores
from pruningawaretraining.session.pruning import Pruning


class Comparing(Protocol):
    """The part of a run that a comparison needs."""

    config: ExperimentConfig
    state: RunState
    device: torch.device
    images: Tensor

    def new_model(self) -> nn.Module: ...


def change_model(runner: Comparing, model: nn.Module, pruner: Pruning, change: Callable[[], object]) -> None:
    """Let the pruner change the model; the first time that it removes something, compare with the masked model.

    Args:
        runner: of the run, which remembers the difference.
        model, pruner: of the run.
        change: asks the pruner for it.
    """
    if runner.state.masked_removed is not None:
        change()
        return
    before: dict[str, Tensor] = {}

    def remember() -> None:
        before.update({key: value.detach().clone() for key, value in model.state_dict().items()})

    pruner.before_removal = remember
    change()
    if before:
        devices = [runner.device] if runner.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            config = for_pruner(runner.config.pruning)
            masked = masked_scores(runner.new_model(), before, config, pruner.masks, runner.images)
        if masked is not None:
            runner.state.masked_removed = difference(masked, scores(model, runner.images))
