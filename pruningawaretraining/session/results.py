"""Results of a pruner: the part of the facade that reports."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pruningawaretraining.report.summary import Report
from pruningawaretraining.session import reporting
from pruningawaretraining.session.bound import Bound
from pruningawaretraining.session.members import Member, member_of
from pruningawaretraining.session.reporting import Macs


class Results(Bound):
    """Phase, sparsity, MACs, masks and reports of a pruner."""

    @property
    def phase(self) -> str:
        """One of "regularize" (no event yet), "prune" (target not met), "finetune" and "done" (training has ended)."""
        return reporting.phase_of(self._session)

    @property
    def member(self) -> Member | None:
        """The member of a family that the model is now, from meeting its target until pruning continues; else None."""
        return member_of(self._session.engine.rules, self._session.model)

    @property
    def has_begun(self) -> bool:
        """Whether training has begun: after a step, an event or ``on_train_begin``."""
        return self._session.begun or self._steps.count > 0

    @property
    def is_active(self) -> bool:
        """Whether any rule is enabled, and the model was not loaded for inference only."""
        return self._session.active

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable groups that are masked or removed; of channels, slices ... together."""
        return reporting.sparsity_of(self._session)

    @property
    def macs(self) -> Macs:
        """MACs of the dense model and of what is kept, on the example inputs; counted on a removed model."""
        return reporting.macs_of(self._session)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name -> keep mask (True = keep): of a set of channels over the dense model's, and of a weight, such as
        "conv1.weight", over its slices, blocks or entries."""
        return reporting.masks_of(self._session)

    def norms(self) -> dict[str, Tensor]:
        """Group name -> L2 norms of the groups that are there, on the CPU."""
        return reporting.norms_of(self._session)

    def describe_sets(self) -> list[dict[str, Any]]:
        """One dict for each set of coupled layers: number, source, dependencies, size and kept groups."""
        return reporting.sets_of(self._session)

    def report(self) -> Report:
        """A report of each layer and the whole model; prints as a table, has ``to_dict()``."""
        self._settle()
        return reporting.report_of(self._session)

    def describe(self) -> dict[str, Any]:
        """Everything that ``save_pruned`` writes beside the tensors: phase, sparsity, MACs, parameters and widths."""
        self._settle()
        return reporting.description_of(self._session)
