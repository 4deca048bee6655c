"""Pruner: the three-line form of a pruning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.criteria.second_order.gradients import LossFn
from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.report.summary import Report
from pruningawaretraining.session.pruning import Macs, Pruning


class Pruner:
    """The three-line form: ``pruner = Pruner(model, target_sparsity=0.5)``, then ``pruner.step()`` after every epoch.

    Channels are masked on the schedule and removed at its last step.

    Args:
        model: the model.
        target_sparsity: fraction of the channels to remove, in (0, 1].
        schedule: a registered schedule.
        start_epoch: the first call of ``step`` that prunes, counted from 0.
        end_epoch: the call that reaches the target.
        total_steps: calls from ``start_epoch`` to ``end_epoch``, instead of ``end_epoch``; 10 if neither is given.
        example_inputs: as for :class:`Pruning`; without it the model's first forward pass shows them.
        optimizer: as for :class:`Pruning`.
        macs: fraction of the MACs to keep; with ``target_sparsity`` as well, at least that many channels go.
        options: any other field of a rule (criterion, layers, regularizer ...).
    """

    def __init__(
        self,
        model: nn.Module,
        target_sparsity: float | None = None,
        schedule: str = "linear",
        *,
        start_epoch: int = 0,
        end_epoch: int | None = None,
        total_steps: int | None = None,
        example_inputs: Any = None,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        macs: float | None = None,
        **options: Any,
    ) -> None:
        if total_steps is not None and (not isinstance(total_steps, int) or total_steps < 1):
            raise ConfigError(f"total_steps: {total_steps!r} is not allowed. Allowed: a whole number, 1 or more")
        if end_epoch is None:
            end_epoch = start_epoch + (10 if total_steps is None else total_steps) - 1
        elif total_steps is not None:
            raise ConfigError(f"total_steps: {total_steps} and end_epoch: {end_epoch} say the same; give one of them")
        target = {key: value for key, value in {"sparsity": target_sparsity, "macs": macs}.items() if value is not None}
        rule = {"schedule": schedule, "start": start_epoch, "end": end_epoch, "target": target, **options}
        self.pruning = Pruning(model, {"rules": [rule]}, example_inputs=example_inputs, optimizer=optimizer)
        self.epoch = 0

    def step(self) -> None:
        """One epoch has ended: mask, or at the last step mask and remove."""
        self.pruning.prune(epoch=self.epoch)
        self.epoch += 1

    def calibrate_with(self, dataloader: Iterable[Any], loss_fn: LossFn) -> None:
        """Give criteria and compensation data; see :meth:`Pruning.calibrate_with`."""
        self.pruning.calibrate_with(dataloader, loss_fn)

    def regularize(self) -> None:
        """Add the regulariser to the gradients; see :meth:`Pruning.channel_regularize`."""
        self.pruning.channel_regularize()

    @property
    def phase(self) -> str:
        """See :attr:`Pruning.phase`."""
        return self.pruning.phase

    @property
    def sparsity(self) -> float:
        """See :attr:`Pruning.sparsity`."""
        return self.pruning.sparsity

    @property
    def macs(self) -> Macs:
        """See :attr:`Pruning.macs`."""
        return self.pruning.macs

    @property
    def masks(self) -> dict[str, Tensor]:
        """See :attr:`Pruning.masks`."""
        return self.pruning.masks

    def report(self) -> Report:
        """See :meth:`Pruning.report`."""
        return self.pruning.report()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside the weights."""
        return {"epoch": self.epoch, "pruning": self.pruning.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], generators: bool = False) -> None:
        """See :meth:`Pruning.load_state_dict`."""
        if not isinstance(state, Mapping) or not {"epoch", "pruning"} <= state.keys():
            raise CheckpointError("state: it is not from Pruner.state_dict(); that of Pruning is another")
        self.pruning.load_state_dict(state["pruning"], generators)
        self.epoch = int(state["epoch"])
