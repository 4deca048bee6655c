"""What criteria know besides the weights: costs, masks, and what was gathered in training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from pruningawaretraining.grouping import Grouping


class GroupCost(Protocol):
    """A cost as a function of masks; see :class:`pruningawaretraining.costs.macs.LinearCost`."""

    names: tuple[str, ...]
    base_L: Tensor

    def __call__(self, keep_G: Tensor) -> float: ...
    def saving_G(self, keep_G: Tensor) -> Tensor: ...


@dataclass
class Statistics:
    """Handed to every criterion.

    Args:
        macs: the MACs of the model as a function of its masks, None for patterns that save none.
        keep_G: groups that are not masked yet, None for all.
        tensors: named statistics that a criterion gathered (moving averages, activations), one a member or group.
    """

    macs: GroupCost | None = None
    keep_G: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Criterion(Protocol):
    """Importance of groups: larger is kept."""

    def score(self, grouping: Grouping, statistics: Statistics) -> Tensor:
        """One score for each group (vector of ``grouping.size``)."""
        ...
