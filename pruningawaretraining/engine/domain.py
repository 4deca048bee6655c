"""A domain: the groups of one kind in a model, with the rules that prune them.

Shape suffixes: ``_G`` groups of one rule.

The engine takes every rule the same way; the domain knows where its groups lie, how masks are chosen among them, and
whether they can be removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pruningawaretraining.criteria.second_order import Calibration
from pruningawaretraining.engine.context import RemovalContext
from pruningawaretraining.engine.rule import Decision


class Domain(Protocol):
    """See the module; rules are of the domain's own kind."""

    removable: bool

    @property
    def rules(self) -> Sequence[Any]:
        """The rules, in order."""

    def ready(self, one: Any, now: int, calibration: Calibration | None) -> bool:
        """Whether the rule's event at ``now`` can take place; else it waits for the first gradients."""

    def check(self, calibration: Calibration | None) -> None:
        """Refuse rules that the data given so far, or its absence, makes impossible."""

    def begin(self, one: Any, context: RemovalContext) -> None:
        """The rule has its first event."""

    def decide(self, one: Any, now: int, calibration: Calibration | None, trial: bool = False) -> Decision:
        """The masks that the rule wants at an event; ``trial`` where they are compared, and none is put."""

    def put(self, one: Any, keep_G: Tensor, context: RemovalContext, calibration: Calibration | None) -> None:
        """Apply the masks of an event, compensation included."""

    def mask(self, one: Any, keep_G: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Mask weights, gradients and optimizer state."""

    def keep_of(self, one: Any) -> Tensor:
        """The rule's masks."""

    def summary(self, one: Any) -> tuple[str, str]:
        """The verb of an event, and what has been reached, for the log."""

    def settle(self) -> None:
        """Masked weights are 0 from now on, whatever the dynamics were."""

    def rebind(self, calibration: Calibration | None) -> None:
        """Take the model's parameters as they are now, by their names."""

    def follow_tensors(self) -> None:
        """Take the model's parameters as they are now; the caller has looked whether they fit."""

    @property
    def groups(self) -> tuple[int, int]:
        """(groups of the dense model, those that are masked or removed)."""

    def norms(self) -> dict[str, Tensor]:
        """L2 norms of the groups by name, on the CPU."""

    def keep_masks(self) -> dict[str, Tensor]:
        """Keep masks by name, on the CPU."""
