"""Costs as functions of the number of kept groups of each set, for many candidates at once (search over widths).

Shape suffixes: ``_N`` candidates, ``_S`` sets, ``_L`` layers, ``_G`` groups.

A cost that knows only masks is asked with masks; within a set, the layers' widths depend on the number of kept groups
alone (where they do not quite, the mask decides in the end).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from pruningawaretraining.costs.macs import LinearCost
from pruningawaretraining.groups.grouping import Grouping


class SetCost(Protocol):
    """A cost of the whole model.

    Attributes:
        timed: whether it predicts a time: it is measured on copies of the model, and widths that it likes are uneven.
    """

    timed: ClassVar[bool]

    @property
    def dense(self) -> float:
        """The dense model's cost."""
        ...

    def __call__(self, keep_G: Tensor) -> float:
        """The cost under a mask."""
        ...

    def of_sets(self, kept_NS: Tensor) -> Tensor:
        """The cost of each candidate, a row of numbers of kept groups."""
        ...

    def neighbours(self) -> Tensor:
        """For each pair of sets, whether the saving of the one depends on the width of the other (bool, S x S)."""
        ...


@dataclass(frozen=True, eq=False)
class Widths:
    """Widths of layers as sums over sets.

    Args:
        out_LS, in_LS: channels of a layer's outputs (inputs) that one group of a set stands for.
        out_L, in_L: channels outside every group.
        block_L: the set of the block that a layer lies in, the number of sets for none; None without such blocks.
    """

    out_LS: Tensor
    in_LS: Tensor
    out_L: Tensor
    in_L: Tensor
    block_L: Tensor | None = None

    @classmethod
    def of(cls, linear: LinearCost, grouping: Grouping) -> Widths:
        """The widths of the layers that a cost knows."""
        out_LS, out_L = _side(linear.out.layers_N, linear.out.groups_N, len(linear.names), grouping)
        in_LS, in_L = _side(linear.in_.layers_N, linear.in_.groups_N, len(linear.names), grouping)
        if linear.block_L is None:
            return cls(out_LS, in_LS, out_L, in_L)
        sets = torch.cat([grouping.set_ids, torch.tensor([len(grouping.sets)])])
        return cls(out_LS, in_LS, out_L, in_L, sets[linear.block_L])

    def there(self, kept_NS: Tensor) -> Tensor:
        """1 for layers whose block stays, 0 for the others (N x L)."""
        if self.block_L is None:
            return torch.ones(1, len(self.out_LS), dtype=torch.float64)
        ones_N = torch.ones(len(kept_NS), 1, dtype=torch.float64)
        return torch.cat([kept_NS, ones_N], 1)[:, self.block_L]

    def outputs(self, kept_NS: Tensor) -> Tensor:
        """Kept outputs of every layer (N x L; 0 where a layer has none that the groups know)."""
        return kept_NS @ self.out_LS.T + self.out_L

    def inputs(self, kept_NS: Tensor) -> Tensor:
        """Kept inputs of every layer."""
        return kept_NS @ self.in_LS.T + self.in_L

    def neighbours(self) -> Tensor:
        """Sets that meet in a layer."""
        met_LS = ((self.out_LS > 0) | (self.in_LS > 0)).double()
        if self.block_L is not None:
            inside = self.block_L < met_LS.shape[1]
            met_LS[torch.nonzero(inside).flatten(), self.block_L[inside]] = 1.0
        return met_LS.T @ met_LS > 0


def _side(layers_N: Tensor, groups_N: Tensor, layers: int, grouping: Grouping) -> tuple[Tensor, Tensor]:
    sets = torch.cat([grouping.set_ids, torch.tensor([len(grouping.sets)])])
    counts = torch.zeros(layers, len(grouping.sets) + 1, dtype=torch.float64)
    counts.index_put_((layers_N, sets[groups_N]), torch.ones(len(layers_N), dtype=torch.float64), accumulate=True)
    return counts[:, :-1] / grouping.set_sizes.double(), counts[:, -1]


class LinearBySets:
    """A :class:`LinearCost` (MACs, parameters) for a search over widths.

    Args:
        linear: the cost.
        grouping: the groups that it is about.
    """

    timed: ClassVar[bool] = False

    def __init__(self, linear: LinearCost, grouping: Grouping) -> None:
        self.linear, self.dense = linear, linear.dense
        self.widths = Widths.of(linear, grouping)

    def __call__(self, keep_G: Tensor) -> float:
        return self.linear(keep_G)

    def marginal_G(self, keep_G: Tensor) -> Tensor:
        """See :meth:`LinearCost.marginal_G`."""
        return self.linear.marginal_G(keep_G)

    def of_sets(self, kept_NS: Tensor) -> Tensor:
        """See :class:`SetCost`."""
        linear = self.linear
        out_NL = _share(self.widths.outputs(kept_NS), linear.out.widths_L)
        in_NL = _share(self.widths.inputs(kept_NS), linear.in_.widths_L)
        return linear.constant + (linear.base_L * out_NL * in_NL * self.widths.there(kept_NS)).sum(1)

    def neighbours(self) -> Tensor:
        """See :class:`SetCost`."""
        return self.widths.neighbours()


def _share(kept_NL: Tensor, widths_L: Tensor) -> Tensor:
    return torch.where(widths_L > 0, kept_NL / widths_L.clamp(min=1), 1.0)


class KeptGroups:
    """Number of kept groups, with weights.

    Args:
        counted_S: which sets count.
        sizes_S: groups in each set.
        counted_G: which groups count.
    """

    timed: ClassVar[bool] = False

    def __init__(self, counted_S: Tensor, sizes_S: Tensor, counted_G: Tensor) -> None:
        self.counted_S, self.counted_G = counted_S.double(), counted_G
        self.dense = float((self.counted_S * sizes_S).sum())

    def __call__(self, keep_G: Tensor) -> float:
        return float((keep_G & self.counted_G).sum())

    def of_sets(self, kept_NS: Tensor) -> Tensor:
        """See :class:`SetCost`."""
        return kept_NS @ self.counted_S

    def neighbours(self) -> Tensor:
        """See :class:`SetCost`."""
        return torch.eye(len(self.counted_S), dtype=torch.bool)
