"""Squared norms of channel groups and factors for their weights: an index built once, no loop over groups.

Shape suffixes: ``_G`` groups, ``_S`` sets, ``_N`` entries of all members in a row, ``_W`` any weight, ``_O`` its first
dimension.

A weight is seen as a matrix of its first dimension and all the others. An entry is one row or one column of it, so
that every sum over entries and every spreading of factors is one gather or scatter for all weights together, and a step
costs one pass over the weights for the norms and one for the gradients: on the CPU compiled, or in blocks that fit a
cache, on other devices in the few launches of :mod:`pruningawaretraining.groups.weight_passes`. All follow a model that
is moved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pruningawaretraining.distributed.fsdp import across, extent, is_sharded, local_of
from pruningawaretraining.groups import kernels as fused
from pruningawaretraining.groups.grouping import Grouping, Member
from pruningawaretraining.groups.placed import placed
from pruningawaretraining.groups.reductions import members_per_set
from pruningawaretraining.groups.weight_passes import WeightPasses
from pruningawaretraining.groups.weight_stores import Sided, broadcast, entries_along, summed

BLOCK = 1 << 18
"""Elements of a weight on the CPU that PyTorch works on at a time: a block and its squares stay in a core's cache."""


@dataclass(frozen=True)
class _Side:
    """A dimension of a weight with the group of each channel."""

    dim: int
    first: int
    last: int
    groups: Tensor


@dataclass(eq=False)
class _Weight:
    """A parameter and its sides."""

    parameter: Tensor
    sides: list[_Side] = field(default_factory=list)

    def along(self, dim: int, values_N: Any) -> Any:
        """The part of all entries' values that is this weight's along one dimension, empty if there is none."""
        return next((values_N[side.first : side.last] for side in self.sides if side.dim == dim), values_N[:0])

    @cached_property
    def is_simple(self) -> bool:
        """Whether it has at most one side along each of the first two dimensions, and no other."""
        dims = [side.dim for side in self.sides]
        return len(set(dims)) == len(dims) and max(dims) < 2

    def off_the_cpu(self) -> Sided:
        """The same for passes on other devices."""
        return Sided(self.parameter, tuple((side.dim, side.groups) for side in self.sides))


class GroupIndex:
    """Squared norms of all channel groups, and factors for their weights, without a loop over groups.

    Args:
        grouping: groups whose members each index one dimension.
        roles: the members that count.
    """

    def __init__(self, grouping: Grouping, roles: Sequence[str]) -> None:
        self.grouping = grouping.of_role(*roles)
        self.weights, self.entries_N = self._lay_out()
        self._set_ids = grouping.set_ids.cpu()
        self.n_sets = len(grouping.sets)
        count_S = members_per_set(self.grouping).clamp(min=1).cpu()
        self._members_G = count_S[self._set_ids].float()
        self.sharded = [weight.parameter for weight in self.weights if is_sharded(weight.parameter)]
        self.shared_N = torch.zeros(len(self.entries_N))  # 1 for entries of sharded weights
        for weight in self.weights if self.sharded else ():
            for side in weight.sides:
                self.shared_N[side.first : side.last] = float(is_sharded(weight.parameter))
        self._room: Tensor | None = None
        self._one: Tensor | None = None
        self._passes: WeightPasses | None = None

    @property
    def device(self) -> torch.device:
        """Current device of the weights, on which everything is computed."""
        return self.weights[0].parameter.device if self.weights else torch.device("cpu")

    @property
    def set_ids(self) -> Tensor:
        """The set of each group."""
        return placed(self._set_ids, self.device)

    @property
    def members_G(self) -> Tensor:
        """How many members each group has, at least 1 (float32)."""
        return placed(self._members_G, self.device)

    def _off_the_cpu(self) -> WeightPasses | None:
        """The passes of other devices, laid out for the weights as they are stored now; None on the CPU."""
        if self.device.type == "cpu":
            return None
        if self._passes is None or not self._passes.fits:
            self._passes = WeightPasses([weight.off_the_cpu() for weight in self.weights], self.grouping.size)
        return self._passes

    def _lay_out(self) -> tuple[list[_Weight], Tensor]:
        weights: dict[int, _Weight] = {}
        entries: list[Tensor] = [torch.zeros(0, dtype=torch.int64)]
        start = 0
        for member in sorted(self.grouping.members, key=lambda member: member.parameter.dim() != 1):
            dim = _only_dimension(member)
            assert member.slots is not None
            slots = member.slots.cpu()
            if is_sharded(member.parameter):
                sizes, starts = extent(member.parameter)
                slots = slots[starts[dim] : starts[dim] + sizes[dim]]
            along = entries_along(dim, slots, member.parameter.shape)
            weight = weights.setdefault(id(member.parameter), _Weight(member.parameter))
            weight.sides.append(_Side(dim, start, start + len(along), slots))
            entries.append(along)
            start += len(along)
        return list(weights.values()), torch.cat(entries)

    # --- norms -----------------------------------------------------------------------------------------------------

    def squared_norms(self) -> Tensor:
        """Sum of squares of every group over its members (vector of groups, float32)."""
        passes = self._off_the_cpu()
        if passes is not None:
            whole_G1, part_G1 = passes.squared_norms()
            return (whole_G1 if part_G1 is None else across(part_G1, self.sharded) + whole_G1)[:-1]
        sums_N = torch.zeros_like(self.entries_N, dtype=torch.float32)
        array_N, kernels = sums_N.numpy(), fused.kernels()
        for weight in self.weights:
            values_W = local_of(weight.parameter)
            if kernels is not None and weight.is_simple and fused.fits(values_W):
                kernels.add_square_sums(fused.as_matrix(values_W), weight.along(0, array_N), weight.along(1, array_N))
                continue
            sides = [(side.dim, sums_N[side.first : side.last]) for side in weight.sides]
            self._add_squares(values_W, sides)
        if not self.sharded:
            return torch.zeros(self.grouping.size + 1).index_add_(0, self.entries_N, sums_N)[:-1]
        part_N = sums_N * self.shared_N  # entries of weights that every process holds whole are counted on each
        part = torch.zeros(self.grouping.size + 1).index_add_(0, self.entries_N, part_N)
        whole = torch.zeros_like(part).index_add_(0, self.entries_N, sums_N - part_N)
        return (across(part, self.sharded) + whole)[:-1]

    def _add_squares(self, values_W: Tensor, sides: list[tuple[int, Tensor]]) -> None:
        """Add the squares of a weight, summed along all but one dimension, to each side's vector."""
        if values_W.dim() == 1 or not _is_matrix(values_W, sides):
            square_W = values_W.float().square()
            for dim, sums in sides:
                sums += summed(square_W, dim)
            return
        flat = values_W.view(values_W.shape[0], -1)
        for rows in _blocks(flat):
            part = flat[rows]
            square = torch.mul(part, part, out=self._scratch(part))
            for dim, sums in sides:  # matrix-vector products are the fastest such reductions
                if dim == 0:
                    sums[rows] += square @ self._ones(part)[: part.shape[1]]
                else:
                    sums.addmv_(square.t(), self._ones(part)[: part.shape[0]])

    def _scratch(self, like: Tensor) -> Tensor:
        """Scratch memory for one block, reused because allocation costs more than filling."""
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

    # --- gradients -------------------------------------------------------------------------------------------------

    def add_to_gradients(self, factor_G: Tensor, only: set[int] | None = None) -> None:
        """``grad += factor * weight`` for every member; a weight in two groups takes the sum of their factors.

        Args:
            factor_G: one factor for each group.
            only: ids of the parameters that are meant; None for all.
        """
        padded_G = torch.cat([factor_G, factor_G.new_zeros(1)])
        passes = self._off_the_cpu()
        if passes is not None:
            passes.add_scaled(padded_G, only)
            return
        factor_N = torch.index_select(padded_G, 0, self.entries_N)
        array_N, kernels = factor_N.numpy(), fused.kernels() if factor_N.dtype is torch.float32 else None
        for weight in self.weights:
            if weight.parameter.grad is None or (only is not None and id(weight.parameter) not in only):
                continue
            gradient_W, values_W = local_of(weight.parameter.grad), local_of(weight.parameter)
            if kernels is not None and weight.is_simple and fused.fits(values_W) and fused.fits(gradient_W):
                along = weight.along(0, array_N), weight.along(1, array_N)
                kernels.add_scaled(fused.as_matrix(gradient_W), fused.as_matrix(values_W), *along)
                continue
            factors = [(side.dim, factor_N[side.first : side.last].to(gradient_W.dtype)) for side in weight.sides]
            _add_scaled(gradient_W, values_W, factors)

    def extremes(self, values_G: Tensor, keep_G: Tensor | None) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each group's set, over groups that are kept (two vectors of groups)."""
        low_G = values_G if keep_G is None else values_G.masked_fill(~keep_G, math.inf)
        high_G = values_G if keep_G is None else values_G.masked_fill(~keep_G, -math.inf)
        low_S = values_G.new_full((self.n_sets,), math.inf).scatter_reduce_(0, self.set_ids, low_G, "amin")
        high_S = values_G.new_full((self.n_sets,), -math.inf).scatter_reduce_(0, self.set_ids, high_G, "amax")
        return low_S[self.set_ids], high_S[self.set_ids]


def _only_dimension(member: Member) -> int:
    return next(index for index, label in enumerate(member.labels) if label is not None)


def _is_matrix(values_W: Tensor, sides: Sequence[tuple[int, Tensor]]) -> bool:
    """Whether a weight can be seen as a matrix whose rows are its first dimension."""
    return values_W.dtype == torch.float32 and values_W.is_contiguous() and all(dim < 2 for dim, _ in sides)


def _blocks(flat: Tensor) -> list[slice]:
    """Runs of rows that fit a cache."""
    if flat.numel() <= BLOCK:
        return [slice(0, flat.shape[0])]
    step = max(1, BLOCK // flat.shape[1])
    return [slice(first, first + step) for first in range(0, flat.shape[0], step)]


def _add_scaled(gradient_W: Tensor, values_W: Tensor, factors: list[tuple[int, Tensor]]) -> None:
    """``gradient += values * factor``, each factor along the rows, the columns or a later dimension."""
    if values_W.dim() > 1 and gradient_W.is_contiguous() and _is_matrix(values_W, factors):
        flat_gradient, flat = gradient_W.view(len(values_W), -1), values_W.view(len(values_W), -1)
        along = [(dim, factor.view(-1, 1) if dim == 0 else factor.view(1, -1)) for dim, factor in factors]
        for rows in _blocks(flat):
            part, target = flat[rows], flat_gradient[rows]
            for dim, factor in along:
                target.addcmul_(part, factor[rows] if dim == 0 else factor)
        return
    parts = [broadcast(factor, dim, values_W.shape) for dim, factor in factors]
    gradient_W.addcmul_(values_W.to(gradient_W.dtype), sum(parts[1:], parts[0]))
