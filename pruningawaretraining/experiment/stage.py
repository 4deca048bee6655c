"""One model of an experiment in training, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pruningawaretraining.distributed.ddp import rewrap_in_place
from pruningawaretraining.experiment import record
from pruningawaretraining.experiment.optim import Scheduler
from pruningawaretraining.experiment.train import Learner


class SilentRecorder(record.Recorder):
    """Recorder of processes that write nothing; the first one writes the results of all."""

    def add(self, row: Mapping[str, Any], norms: Mapping[str, Tensor] | None = None) -> None:
        self.rows.append(dict(row))
        if norms is not None:
            self.norms.append({"epoch": row["epoch"]})


@dataclass
class Stage:
    """One model in training.

    Attributes:
        name: "dense" or "pruned".
        learner: the model with its optimizer and pruner.
        scheduler: of the learning rate.
    """

    name: str
    learner: Learner
    scheduler: Scheduler | None

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
