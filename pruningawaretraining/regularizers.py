"""Regularisers: penalties on whole groups, added to the gradients after backward.

Shape suffixes: ``_G`` groups, ``_S`` sets, ``_N`` channel entries of all members in a row, ``_O``/``_I`` output and
input channels, ``_W`` any weight.

Everything that only depends on the groups is an index built once. A step then costs one pass over the weights for the
norms and one for the gradients; there is no loop over groups and nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruningawaretraining.criteria.magnitude import members_per_set
from pruningawaretraining.grouping import Grouping, Member
from pruningawaretraining.registry import register


@dataclass(frozen=True, eq=False)
class _Weight:
    """A parameter, and where its channel entries lie in the row of all entries."""

    parameter: Tensor
    out: tuple[int, int, int] | None  # dimension, first entry, past the last entry
    in_: tuple[int, int, int] | None


class GroupIndex:
    """Squared norms of all channel groups, and factors for their weights, without a loop over groups.

    Args:
        grouping: groups whose members each index one dimension.
        roles: the members that count.
    """

    def __init__(self, grouping: Grouping, roles: Sequence[str]) -> None:
        self.grouping = grouping.of_role(*roles)
        self.device = self.grouping.members[0].parameter.device if self.grouping.members else torch.device("cpu")
        self.weights, entries = self._lay_out()
        self.entries_N = entries.to(self.device)
        self.set_ids = grouping.set_ids.to(self.device)
        self.n_sets = len(grouping.sets)
        count_S = members_per_set(self.grouping).clamp(min=1).to(self.device)
        self.members_G = count_S[self.set_ids].float()
        self._room: Tensor | None = None
        self._one: Tensor | None = None

    def _lay_out(self) -> tuple[list[_Weight], Tensor]:
        sides: dict[int, dict[str, tuple[int, int, int]]] = {}
        tensors: dict[int, Tensor] = {}
        entries: list[Tensor] = [torch.zeros(0, dtype=torch.int64)]
        start = 0
        for member in self.grouping.members:
            dim = _only_dimension(member)
            assert member.slots is not None
            tensors[id(member.parameter)] = member.parameter
            side = "in" if member.role == "in" else "out"
            sides.setdefault(id(member.parameter), {})[side] = (dim, start, start + len(member.slots))
            entries.append(member.slots)
            start += len(member.slots)
        weights = [_Weight(tensors[key], found.get("out"), found.get("in")) for key, found in sides.items()]
        return weights, torch.cat(entries)

    def squared_norms(self) -> Tensor:
        """Sum of squares of every group over its members (vector of groups, float32)."""
        sums_N = torch.zeros(len(self.entries_N), device=self.device)
        for weight in self.weights:
            sides = [
                (dim, sums_N[first:last])
                for dim, first, last in (side for side in (weight.out, weight.in_) if side is not None)
            ]
            self._add_squares(weight.parameter.detach(), sides)
        total = torch.zeros(self.grouping.size + 1, device=self.device).index_add_(0, self.entries_N, sums_N)
        return total[:-1]

    def _add_squares(self, values_W: Tensor, sides: list[tuple[int, Tensor]]) -> None:
        """Add the squares of a weight, summed along all but one dimension, to each side's vector."""
        if values_W.dim() == 1 or not _is_matrix(values_W, sides):
            square_W = values_W.float().square()
            for dim, sums in sides:
                others = [index for index in range(values_W.dim()) if index != dim]
                sums += square_W.sum(dim=others) if others else square_W
            return
        flat = values_W.view(values_W.shape[0], -1)
        columns = flat.new_zeros(flat.shape[1])
        for rows in _blocks(flat):
            part = flat[rows]
            square = torch.mul(part, part, out=self._scratch(part))
            for dim, sums in sides:  # matrix-vector products are the fastest such reductions
                if dim == 0:
                    sums[rows] = square @ self._ones(part)[: part.shape[1]]
                else:
                    columns.addmv_(square.t(), self._ones(part)[: part.shape[0]])
        for dim, sums in sides:
            if dim == 1:
                sums += columns.view(len(sums), -1).sum(1)

    def _scratch(self, like: Tensor) -> Tensor:
        """Room for one block, reused for all: allocating it every time costs more than filling it."""
        if self._room is None or self._room.dtype != like.dtype or self._room.device != like.device:
            self._room = torch.empty(self._largest_block(), dtype=like.dtype, device=like.device)
        return self._room[: like.numel()].view(like.shape)

    def _ones(self, like: Tensor) -> Tensor:
        if self._one is None or self._one.dtype != like.dtype or self._one.device != like.device:
            longest = max(max(w.parameter.shape[0], w.parameter[0].numel()) for w in self.weights)
            self._one = torch.ones(longest, dtype=like.dtype, device=like.device)
        return self._one

    def _largest_block(self) -> int:
        return max(max(BLOCK, w.parameter[0].numel() if w.parameter.dim() else 1) for w in self.weights)

    def add_to_gradients(self, factor_G: Tensor, only: set[int] | None = None) -> None:
        """``grad += factor * weight`` for every member; a weight in two groups takes the sum of their factors.

        Args:
            factor_G: one factor for each group.
            only: ids of the parameters that are meant; None for all.
        """
        factor_N = torch.cat([factor_G, factor_G.new_zeros(1)])[self.entries_N]
        for weight in self.weights:
            gradient = weight.parameter.grad
            if gradient is None or (only is not None and id(weight.parameter) not in only):
                continue
            factors = [
                (dim, factor_N[first:last].to(gradient.dtype))
                for dim, first, last in (side for side in (weight.out, weight.in_) if side is not None)
            ]
            _add_scaled(gradient, weight.parameter.detach(), factors)

    def extremes(self, values_G: Tensor, keep_G: Tensor | None) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each group's set, over groups that are kept (two vectors of groups)."""
        low_G = values_G if keep_G is None else values_G.masked_fill(~keep_G, math.inf)
        high_G = values_G if keep_G is None else values_G.masked_fill(~keep_G, -math.inf)
        low_S = values_G.new_full((self.n_sets,), math.inf).scatter_reduce_(0, self.set_ids, low_G, "amin")
        high_S = values_G.new_full((self.n_sets,), -math.inf).scatter_reduce_(0, self.set_ids, high_G, "amax")
        return low_S[self.set_ids], high_S[self.set_ids]


def _only_dimension(member: Member) -> int:
    return next(index for index, label in enumerate(member.labels) if label is not None)


BLOCK = 1 << 18
"""Elements of a weight that are worked on at a time: a block and what is made of it stay in a core's cache."""


def _is_matrix(values_W: Tensor, sides: Sequence[tuple[int, Tensor]]) -> bool:
    """Whether a weight can be seen as a matrix whose rows are its first dimension."""
    return values_W.dtype == torch.float32 and values_W.is_contiguous() and all(dim < 2 for dim, _ in sides)


def _blocks(flat: Tensor) -> list[slice]:
    """Runs of rows: blocks that fit a cache on a CPU, the whole matrix elsewhere."""
    if flat.device.type != "cpu" or flat.numel() <= BLOCK:
        return [slice(0, flat.shape[0])]
    step = max(1, BLOCK // flat.shape[1])
    return [slice(first, first + step) for first in range(0, flat.shape[0], step)]


def _add_scaled(gradient_W: Tensor, values_W: Tensor, factors: list[tuple[int, Tensor]]) -> None:
    """``gradient += values * factor``, each factor along one dimension."""
    if values_W.dim() > 1 and gradient_W.is_contiguous() and _is_matrix(values_W, factors):
        # Seen as a matrix, every inner loop is long; a factor of shape (O, I, 1, 1) would make loops of kernel length.
        kernel = math.prod(values_W.shape[2:])
        flat_gradient, flat = gradient_W.view(len(values_W), -1), values_W.view(len(values_W), -1)
        along = [(dim, f.view(-1, 1) if dim == 0 else f.repeat_interleave(kernel).view(1, -1)) for dim, f in factors]
        for rows in _blocks(flat):
            part, target = flat[rows], flat_gradient[rows]
            for dim, factor in along:
                target.addcmul_(part, factor[rows] if dim == 0 else factor)
        return
    parts = [factor.view([-1 if index == dim else 1 for index in range(values_W.dim())]) for dim, factor in factors]
    gradient_W.addcmul_(values_W.to(gradient_W.dtype), sum(parts[1:], parts[0]))


class Regularizer:
    """A penalty made ready for one grouping.

    Args:
        index: the groups.
        strength_G: penalty of each group.
        factor: ``(squared norms, index, keep) -> factor`` of each group's weights in the gradient.
    """

    def __init__(
        self,
        index: GroupIndex,
        strength_G: Tensor,
        factor: Callable[[Tensor, GroupIndex, Tensor | None], Tensor],
    ) -> None:
        self.index, self.factor = index, factor
        self.strength_G = strength_G.to(index.device, torch.float32)

    @torch.no_grad()
    def factors(self, keep_G: Tensor | None = None) -> Tensor:
        """What each group's weights are multiplied with in the penalty's gradient, at the weights as they are now.

        Args:
            keep_G: groups that are not masked (True), on the index's device; None for all.
        """
        factor_G = self.factor(self.index.squared_norms(), self.index, keep_G) * self.strength_G
        return factor_G if keep_G is None else factor_G * keep_G

    @torch.no_grad()
    def add(self, factor_G: Tensor, only: set[int] | None = None) -> None:
        """Add the penalty's gradient in place; see :meth:`GroupIndex.add_to_gradients`."""
        self.index.add_to_gradients(factor_G, only)

    def __call__(self, keep_G: Tensor | None = None, scale: Tensor | float = 1.0) -> None:
        """Add the penalty's gradient in place, in the gradients' own ``scale``."""
        self.add(self.factors(keep_G) * scale)


def _strengths(grouping: Grouping, strength: float, mac_strength: float, saving_G: Tensor | None) -> Tensor:
    out_G = torch.full((grouping.size,), strength, dtype=torch.float64)
    if mac_strength and saving_G is not None:
        out_G = out_G + mac_strength * saving_G / saving_G.mean().clamp(min=1e-30)
    return out_G


def _check_not_negative(**values: float) -> None:
    for key, value in values.items():
        if not value >= 0:
            raise ValueError(f"{key}: {value!r} must be 0 or more")


@register("regularizer", "growing_l2", "GroupNormPruner")
@dataclass(frozen=True)
class GrowingL2:
    """L2 decay that grows from 1 to ``2^alpha`` times as a channel falls behind the others of its set.

    With s the root of a group's magnitude and r = (max s - s) / (max s - min s) in its set:
    ``grad += strength * (2^alpha)^(gamma r) * w`` on output and input weights and norm weights, never on biases (Fang
    et al. 2023, DepGraph, section 3.3; after Wang et al. 2021, Growing Regularization).

    Args:
        strength: lambda of a channel that is as large as the largest.
        alpha: the smallest channel is decayed ``2^alpha`` times as much.
        gamma: exponent on the growing factor.
        mac_strength: added to lambda in proportion to the MACs that the channel costs (1 at the mean).
    """

    strength: float = 5e-4
    alpha: float = 4.0
    gamma: float = 1.0
    mac_strength: float = 0.0

    def __post_init__(self) -> None:
        _check_not_negative(strength=self.strength, alpha=self.alpha, gamma=self.gamma, mac_strength=self.mac_strength)

    def prepare(self, grouping: Grouping, saving_G: Tensor | None = None) -> Regularizer:
        """Build the index for a grouping; ``saving_G`` are the MACs that each group costs."""
        index = GroupIndex(grouping, ("out", "in", "norm"))
        exponent = self.alpha * self.gamma

        def factor(norms_G: Tensor, index: GroupIndex, keep_G: Tensor | None) -> Tensor:
            size_G = (norms_G / index.members_G).sqrt()
            low_G, high_G = index.extremes(size_G, keep_G)
            span_G = high_G - low_G
            behind_G = torch.where(span_G > 0, (high_G - size_G) / span_G, torch.zeros_like(size_G))
            return torch.exp2(exponent * behind_G.clamp(0, 1))

        return Regularizer(index, _strengths(grouping, self.strength, self.mac_strength, saving_G), factor)


def _inverse_norm(norms_G: Tensor, index: GroupIndex, keep_G: Tensor | None) -> Tensor:
    return torch.where(norms_G > 0, norms_G.rsqrt(), torch.zeros_like(norms_G))


@register("regularizer", "group_lasso")
@dataclass(frozen=True)
class GroupLasso:
    """The group lasso ``strength * sum of ||w_g||_2`` over whole coupled groups (Yuan and Lin 2006).

    Its gradient is ``strength * w / ||w_g||``, and 0 where the group is 0.

    Args:
        strength: lambda.
        mac_strength: added to lambda in proportion to the MACs that the group costs (1 at the mean).
    """

    strength: float = 1e-4
    mac_strength: float = 0.0

    def __post_init__(self) -> None:
        _check_not_negative(strength=self.strength, mac_strength=self.mac_strength)

    def prepare(self, grouping: Grouping, saving_G: Tensor | None = None) -> Regularizer:
        """Build the index for a grouping; ``saving_G`` are the MACs that each group costs."""
        strength_G = _strengths(grouping, self.strength, self.mac_strength, saving_G)
        return Regularizer(GroupIndex(grouping, ("out", "in", "norm")), strength_G, _inverse_norm)


@register("regularizer", "bn_scale", "bn_l1", "BNScalePruner")
@dataclass(frozen=True)
class NormScaleLasso:
    """Group lasso on the norm weights alone; with one norm behind a channel it is the L1 penalty of Liu et al. 2017.

    ``grad += strength * weight / ||weights of the group||_2``.

    Args:
        strength: lambda.
    """

    strength: float = 1e-4

    def __post_init__(self) -> None:
        _check_not_negative(strength=self.strength)

    def prepare(self, grouping: Grouping, saving_G: Tensor | None = None) -> Regularizer:
        """Build the index for a grouping; ``saving_G`` is not used."""
        strength_G = _strengths(grouping, self.strength, 0.0, None)
        return Regularizer(GroupIndex(grouping, ("norm",)), strength_G, _inverse_norm)


def prepare(options: Any, grouping: Grouping, saving_G: Tensor | None = None) -> Regularizer:
    """Make a registered regulariser ready for a grouping."""
    ready: Regularizer = options.prepare(grouping, saving_G)
    return ready
