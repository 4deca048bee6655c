"""One model of an experiment in training, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pruningawaretraining.config.options import support_of
from pruningawaretraining.config.schema import PruningConfig
from pruningawaretraining.distributed.ddp import rewrap_in_place
from pruningawaretraining.engine.coupled_rules import norms_of_sets
from pruningawaretraining.experiment import record
from pruningawaretraining.experiment.data import Batch
from pruningawaretraining.experiment.finish import prunes
from pruningawaretraining.experiment.optim import Scheduler, step_scheduler
from pruningawaretraining.experiment.recovering import RunRecovery, costs_of
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
        planned: epochs of the config.
        recovery: of the pruned model, where one is asked for.
        control: coupled channels of a dense baseline, see :func:`control_grouping`.
    """

    name: str
    learner: Learner
    scheduler: Scheduler | None
    planned: int
    recovery: RunRecovery | None = None
    control: Grouping | None = None

    def norms(self) -> dict[str, Tensor] | None:
        """Set of coupled layers -> the L2 norms of its groups; None where nothing is pruned or watched."""
        pruner = self.learner.pruner
        if pruner is not None:
            return pruner.norms() if prunes(pruner) else None
        return None if self.control is None else norms_of_sets(self.control)

    @property
    def epochs(self) -> int:
        """How many there are, with those that a budget has added."""
        return self.planned if self.recovery is None else self.recovery.epochs

    def epoch_over(self, epoch: int, loss: float, dense: Callable[[], nn.Module], batches: Iterable[Batch]) -> None:
        """The steps and events of an epoch are over: go on with schedule and recovery.

        Args:
            epoch: its number.
            loss: its mean.
            dense: builds the dense model.
            batches: of the training.
        """
        learner, recovery = self.learner, self.recovery
        if recovery is None or not recovery.sets_rates:
            step_scheduler(self.scheduler, loss)
        if recovery is not None and learner.pruner is not None:
            cost = costs_of(dense, learner, batches)
            recovery.epoch_over(epoch + 1, learner.model, learner.pruner, cost)

    def rewrapped(self) -> Learner:
        """The learner; with several processes it is rewrapped after a removal."""
        if self.learner.wrapped is not None:
            rewrap_in_place(self.learner.wrapped)
        return self.learner

    def recovered(self, batches: Iterable[Batch], accuracy: Callable[[], float], last: float) -> dict[str, Any] | None:
        """Put the average in the place of the last weights and report the recovery; None without one.

        Args:
            batches: of the training.
            accuracy: of the model as it is.
            last: that of the last weights.
        """
        return None if self.recovery is None else self.recovery.finish(self.learner.model, batches, accuracy, last)

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes: tensors and plain data."""
        learner = self.learner
        return {
            "model": learner.model.state_dict(),
            "optimizer": learner.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": learner.precision.scaler.state_dict(),
            "pruner": None if learner.pruner is None else learner.pruner.state_dict(),
            "recovery": None if self.recovery is None else self.recovery.state_dict(),
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
        if self.recovery is not None and self.learner.pruner is not None:
            self.recovery.load_state_dict(state["recovery"], self.learner.model, self.learner.pruner)
