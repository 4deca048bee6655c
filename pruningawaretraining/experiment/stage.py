"""One model of an experiment in training, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pruningawaretraining.config.options import support_of
from pruningawaretraining.config.schema import PruningConfig
from pruningawaretraining.distributed.ddp import rewrap_in_place
from pruningawaretraining.engine.coupled_rules import norms_of_sets
from pruningawaretraining.experiment import record
from pruningawaretraining.experiment.finish import prunes
from pruningawaretraining.experiment.optim import Scheduler
from pruningawaretraining.experiment.train import Learner
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.patterns.channel import chosen_layers, find_channels
from pruningawaretraining.registry import build


class SilentRecorder(record.Recorder):
    """Recorder of processes that write nothing; the first one writes the results of all."""

    def add(self, row: Mapping[str, Any], norms: Mapping[str, Tensor] | None = None) -> None:
        self.rows.append(dict(row))
        if norms is not None and row["model"] != "dense":
            self.norms.append({"epoch": row["epoch"]})


def control_grouping(model: nn.Module, config: PruningConfig, inputs: Tensor) -> Grouping | None:
    """The coupled channels of the dense baseline, whose norms show what a regulariser does; None without one.

    Args:
        model: dense, on its device.
        config: what prunes the other model.
        inputs: of the model.
    """
    penalised = [rule for rule in config.rules if rule.enabled and rule.regularizer]
    if not any(support_of(build("pattern", rule.pattern, "pattern")).removable for rule in penalised):
        return None
    return find_channels(model, inputs, chosen_layers(model, None), limit=config.trace_limit).grouping


@dataclass
class Stage:
    """One model in training.

    Attributes:
        name: "dense" or "pruned".
        learner: the model with its optimizer and pruner.
        scheduler: of the learning rate.
        control: coupled channels of a dense baseline, see :func:`control_grouping`.
    """

    name: str
    learner: Learner
    scheduler: Scheduler | None
    control: Grouping | None = None

    def norms(self) -> dict[str, Tensor] | None:
        """Set of coupled layers -> the L2 norms of its groups; None where nothing is pruned or watched."""
        pruner = self.learner.pruner
        if pruner is not None:
            return pruner.norms() if prunes(pruner) else None
        return None if self.control is None else norms_of_sets(self.control)

    def rewrapped(self) -> Learner:
        """The learner; with several processes it is rewrapped after a removal."""
        if self.learner.wrapped is not None:
            rewrap_in_place(self.learner.wrapped)
        return self.learner

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes: tensors and plain data."""
        learner = self.learner
        return {
            "model": learner.model.state_dict(),
            "optimizer": learner.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": learner.precision.scaler.state_dict(),
            "pruner": None if learner.pruner is None else learner.pruner.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Bring a freshly built stage to where ``state`` was taken; the pruner first, for the model's architecture."""
        if self.learner.pruner is not None:
            self.learner.pruner.load_state_dict(state["pruner"], generators=True)
        self.learner.model.load_state_dict(state["model"])
        self.learner.optimizer.load_state_dict(state["optimizer"])
        self.learner.precision.scaler.load_state_dict(state["scaler"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
