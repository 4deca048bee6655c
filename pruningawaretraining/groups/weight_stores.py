"""Weights of one device and dtype: sums of squares along their rows and columns, and factors along them.

Shape suffixes: ``_N`` entries (rows, columns) of all weights, ``_W`` any weight, ``_RC`` a weight as a matrix of its
first dimension and all the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pruningawaretraining.distributed.fsdp import local_of

SCRATCH = 1 << 24
"""Elements of factors that are spelled out at a time; a weight with more takes its factors one dimension at a time."""
ORDERS = ((0, 1), (0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 4), (0, 2, 3, 1), (0, 2, 3, 4, 1))
"""The orders of dimensions in memory that make a matrix: contiguous, and channels last."""


@dataclass(frozen=True, eq=False)
class Sided:
    """A parameter with groups along some of its dimensions.

    Args:
        parameter: the parameter.
        sides: (dimension, group of each of its entries on this process) of every such dimension.
    """

    parameter: Tensor
    sides: tuple[tuple[int, Tensor], ...]


def summed(values_W: Tensor, dim: int) -> Tensor:
    """Sums over all but one dimension; along dimension 1 one for each column of the matrix."""
    if dim == 1:
        return values_W.sum(dim=0).reshape(-1)
    others = [index for index in range(values_W.dim()) if index != dim]
    return values_W.sum(dim=others) if others else values_W


def broadcast(factor: Tensor, dim: int, shape: torch.Size) -> Tensor:
    """One factor for each entry of :func:`summed` in a shape that broadcasts to the weight's."""
    if dim == 1:
        return factor.view(1, *shape[1:])
    return factor.view([-1 if index == dim else 1 for index in range(len(shape))])


def entries_along(dim: int, groups: Tensor, shape: torch.Size) -> Tensor:
    """The group of each entry of :func:`summed`."""
    return groups.repeat_interleave(math.prod(shape[2:])) if dim == 1 else groups


@dataclass(frozen=True, eq=False)
class _Matrix:
    """A weight that is a matrix in memory.

    Args:
        parameter: the weight.
        order: its dimensions as they lie in memory, the first one first.
        row, column: numbers of the parts of the entries that belong to its rows and columns; None without groups there.
    """

    parameter: Tensor
    order: tuple[int, ...]
    row: int | None
    column: int | None

    def of(self, values_W: Tensor) -> Tensor:
        """A tensor stored like the weight as a matrix."""
        return values_W.permute(self.order).flatten(1)

    def along_columns(self, factor: Tensor, shape: torch.Size) -> Tensor:
        """The columns' factors in a shape that broadcasts to the weight's."""
        back = [self.order.index(dim) for dim in range(len(self.order))]
        return factor.view(1, *(shape[dim] for dim in self.order[1:])).permute(back)


@dataclass(eq=False)
class WeightStore:
    """The weights of one device and dtype that are whole on this process, or those that are not."""

    device: torch.device
    dtype: torch.dtype
    sharded: bool
    vectors: list[Tensor] = field(default_factory=list)
    matrices: list[_Matrix] = field(default_factory=list)
    others: list[tuple[Tensor, int, int]] = field(default_factory=list)  # parameter, dimension, number of the part
    parts: list[Tensor] = field(default_factory=list)  # groups of entries: vectors first, then matrices, then others
    runs: list[list[_Matrix]] = field(default_factory=list)
    _waiting: list[Sided] = field(default_factory=list)

    def take(self, one: Sided) -> None:
        """Add a weight; vectors come first."""
        if one.parameter.dim() == 1 and len(one.sides) == 1:
            self.vectors.append(one.parameter)
            self.parts.append(one.sides[0][1])
        else:
            self._waiting.append(one)

    def close(self) -> None:
        """Lay out the added weights."""
        shaped = [(one, _order(one)) for one in self._waiting]
        for one, order in shaped:
            if order is not None:
                self._add_matrix(one, order)
        normed = len(self.parts)
        for one, order in shaped:
            for dim, groups in one.sides if order is None else ():
                self.others.append((one.parameter, dim, len(self.parts)))
                self.parts.append(entries_along(dim, groups, one.parameter.shape))
        self.lengths = [len(part) for part in self.parts]
        self.normed = slice(sum(self.lengths[: len(self.vectors)]), sum(self.lengths[:normed]))
        self.entries_N = torch.cat(self.parts).to(self.device)
        both = [one for one in self.matrices if one.row is not None and one.column is not None]
        self.runs = _runs([one for one in both if local_of(one.parameter).numel() <= SCRATCH])
        spelled = {id(one) for run in self.runs for one in run}
        self.singly = [one for one in self.matrices if id(one) not in spelled]
        self.parts, self._waiting = [], []

    def _add_matrix(self, one: Sided, order: tuple[int, ...]) -> None:
        places: list[int | None] = [None, None]
        for dim, groups in one.sides:
            places[dim] = len(self.parts)
            kernel = math.prod(one.parameter.shape[2:])
            inside = groups.repeat(kernel) if order[1:2] != (1,) else groups.repeat_interleave(kernel)
            self.parts.append(groups if dim == 0 else inside)
        self.matrices.append(_Matrix(one.parameter, order, *places))

    def square_sums(self) -> Tensor:
        """Sums of squares of every entry (float32)."""
        sums_N = torch.empty(len(self.entries_N), dtype=torch.float32, device=self.device)
        parts = torch.split(sums_N, self.lengths)
        if self.vectors:
            flat_N = torch.cat([local_of(one) for one in self.vectors]).float()
            torch.mul(flat_N, flat_N, out=sums_N[: len(flat_N)])
        for one in self.matrices:
            values_RC = one.of(local_of(one.parameter))
            values_RC = values_RC.float() if self.dtype is torch.float64 else values_RC
            for place, dim in ((one.row, 1), (one.column, 0)):
                if place is not None:
                    torch.linalg.vector_norm(values_RC, 2.0, dim, dtype=torch.float32, out=parts[place])
        if self.matrices:
            sums_N[self.normed].square_()
        for parameter, dim, place in self.others:
            parts[place].copy_(summed(local_of(parameter).float().square(), dim))
        return sums_N

    def add_scaled(self, factor_N: Tensor, only: set[int] | None) -> None:
        """``grad += factor * weight``.

        Args:
            factor_N: of every entry, in the weights' dtype.
            only: ids of the parameters that are meant; None for all.
        ."""
        factors = torch.split(factor_N, self.lengths)
        self._add_to_vectors(factors, only)
        for run in self.runs:
            self._add_to_run(run, factors, only)
        for one in self.singly:
            gradient_W = _gradient(one.parameter, only)
            if gradient_W is not None:
                _add_singly(one, gradient_W, factors)
        for parameter, dim, place in self.others:
            gradient_W = _gradient(parameter, only)
            if gradient_W is not None:
                values_W = local_of(parameter)
                gradient_W.addcmul_(
                    values_W.to(gradient_W.dtype),
                    broadcast(factors[place], dim, values_W.shape).to(gradient_W.dtype),
                )

    def _add_to_vectors(self, factors: Sequence[Tensor], only: set[int] | None) -> None:
        gradients, values, scales = [], [], []
        for parameter, factor in zip(self.vectors, factors, strict=False):
            gradient = _gradient(parameter, only)
            if gradient is None:
                continue
            if gradient.dtype is not self.dtype:
                gradient.addcmul_(local_of(parameter).to(gradient.dtype), factor.to(gradient.dtype))
                continue
            gradients.append(gradient)
            values.append(local_of(parameter))
            scales.append(factor)
        if gradients:
            torch._foreach_addcmul_(gradients, values, scales)

    def _add_to_run(self, run: Sequence[_Matrix], factors: Sequence[Tensor], only: set[int] | None) -> None:
        """Expand the factors of many weights, and add them all at once."""
        found: list[tuple[_Matrix, Tensor]] = []
        for one in run:
            gradient_W = _gradient(one.parameter, only)
            if gradient_W is None:
                continue
            if gradient_W.dtype is self.dtype and gradient_W.permute(one.order).is_contiguous():
                found.append((one, one.of(gradient_W)))
            else:
                _add_singly(one, gradient_W, factors)
        if not found:
            return
        room = torch.empty(sum(gradient.numel() for _, gradient in found), dtype=self.dtype, device=self.device)
        rooms = torch.split(room, [gradient.numel() for _, gradient in found])
        scales = []
        for (one, gradient_RC), here in zip(found, rooms, strict=True):
            assert one.row is not None and one.column is not None
            scale_RC = here.view(gradient_RC.shape)
            torch.add(factors[one.row].unsqueeze(1), factors[one.column].unsqueeze(0), out=scale_RC)
            scales.append(scale_RC)
        gradients = [gradient_RC for _, gradient_RC in found]
        torch._foreach_addcmul_(gradients, [one.of(local_of(one.parameter)) for one, _ in found], scales)


def _gradient(parameter: Tensor, only: set[int] | None) -> Tensor | None:
    """This process's part of a gradient, if there is one and it is meant."""
    if parameter.grad is None or (only is not None and id(parameter) not in only):
        return None
    return local_of(parameter.grad)


def _add_singly(one: _Matrix, gradient_W: Tensor, factors: Sequence[Tensor]) -> None:
    """``gradient += factor * weight`` for one weight, dimension by dimension, however the gradient is stored."""
    values_W = local_of(one.parameter).to(gradient_W.dtype)
    if one.row is not None:
        factor_W = factors[one.row].view([-1] + [1] * (values_W.dim() - 1))
        gradient_W.addcmul_(values_W, factor_W.to(gradient_W.dtype))
    if one.column is not None:
        factor_W = one.along_columns(factors[one.column], values_W.shape)
        gradient_W.addcmul_(values_W, factor_W.to(gradient_W.dtype))


def _order(one: Sided) -> tuple[int, ...] | None:
    """The order of dimensions in which a weight is a matrix with groups along rows and columns, or None."""
    dims = [dim for dim, _ in one.sides]
    if one.parameter.dim() < 2 or len(set(dims)) < len(dims) or max(dims) > 1:
        return None
    values_W = local_of(one.parameter)
    fitting = (order for order in ORDERS if len(order) == values_W.dim())
    return next((order for order in fitting if values_W.permute(order).is_contiguous()), None)


def _runs(matrices: Iterable[_Matrix]) -> list[list[_Matrix]]:
    """Matrices in runs of at most ``SCRATCH`` elements."""
    runs: list[list[_Matrix]] = [[]]
    room = SCRATCH
    for one in matrices:
        size = local_of(one.parameter).numel()
        if size > room and runs[-1]:
            runs.append([])
            room = SCRATCH
        runs[-1].append(one)
        room -= size
    return [run for run in runs if run]
