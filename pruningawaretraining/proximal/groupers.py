"""Groupers: how the elements of one weight are grouped.

Shape suffixes: ``_W`` any weight, ``_G`` groups of one weight (in the shape that the grouper gives them).

A grouper is two views of the same partition. :meth:`Grouper.blocks` cuts a weight into views whose group members lie
along known dimensions: nothing is ever copied or flattened, so memory formats and strides do not matter.
:meth:`Grouper.labels` gives one label vector for each dimension: the library's :class:`Grouping`, which also works on
one shard of a weight.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from pruningawaretraining.errors import ConfigError
from pruningawaretraining.groups.grouping import Grouping, GroupSet, Member
from pruningawaretraining.registry import register

Labels: TypeAlias = tuple[tuple[Tensor | None, ...], tuple[int, ...]]
"""A label vector (or None) and the number of labels for each dimension, as in :class:`Member`."""


@dataclass(frozen=True, eq=False)
class GroupView:
    """A part of a weight whose groups are regular.

    Args:
        view: view of the weight.
        dims: the dimensions of the view that lie within a group, ascending; the others count the groups.
        place: where the block's groups lie in the weight's group tensor (an index of slices).
    """

    view: Tensor
    dims: tuple[int, ...]
    place: tuple[slice, ...] = ()

    def groups_of(self, values_G: Tensor) -> Tensor:
        """The block's part of a tensor with one value for each group of the weight: a view."""
        return values_G[self.place] if self.place else values_G

    def broadcast(self, values_G: Tensor) -> Tensor:
        """The same, shaped to broadcast over the block's elements."""
        part = self.groups_of(values_G)
        for dim in self.dims:
            part = part.unsqueeze(dim)
        return part


class Grouper(ABC):
    """Interface of groupers of single weights; the classes below are frozen dataclasses."""

    @abstractmethod
    def check(self, shape: Sequence[int], where: str) -> None:
        """Raise :class:`ConfigError` if a weight of this shape cannot be grouped; ``where`` names it."""

    @abstractmethod
    def group_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a tensor with one entry for each group, in the order of the labels."""

    @abstractmethod
    def group_size(self, shape: Sequence[int]) -> int:
        """Elements of one group, padding included."""

    @abstractmethod
    def blocks(self, weight_W: Tensor) -> list[GroupView]:
        """Views that cover the weight."""

    @abstractmethod
    def labels(self, shape: Sequence[int]) -> Labels:
        """The same groups as separable labels."""

    def n_groups(self, shape: Sequence[int]) -> int:
        """Number of groups of a weight."""
        return math.prod(self.group_shape(shape))

    def grouping(self, name: str, weight_W: Tensor) -> Grouping:
        """The groups of a weight as a :class:`Grouping` of the library.

        Raises:
            ConfigError: the weight's shape does not suit the grouper.
        """
        self.check(weight_W.shape, name)
        labels, sizes = self.labels(weight_W.shape)
        size = self.n_groups(weight_W.shape)
        return Grouping(type(self).__name__, (Member(name, weight_W, labels, sizes),), (GroupSet(name, 0, size),))


def at_least_dims(shape: Sequence[int], least: int, where: str, grouper: Grouper) -> None:
    """Refuse a weight of too few dimensions."""
    if len(shape) < least:
        raise ConfigError(
            f"{where}: {type(grouper).__name__} needs a weight of {least} dimensions or more, got shape {tuple(shape)}"
        )


def along(shape: Sequence[int], dim: int, labels: Tensor, size: int) -> Labels:
    """Labels along one dimension only."""
    return (
        tuple(labels if index == dim else None for index in range(len(shape))),
        tuple(size if index == dim else 1 for index in range(len(shape))),
    )


def split_dim(weight_W: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """One dimension cut into several: a view, whatever the strides."""
    stride = weight_W.stride(dim)
    strides = [stride * math.prod(sizes[index + 1 :]) for index in range(len(sizes))]
    shape = (*weight_W.shape[:dim], *sizes, *weight_W.shape[dim + 1 :])
    before, after = weight_W.stride()[:dim], weight_W.stride()[dim + 1 :]
    return weight_W.as_strided(shape, (*before, *strides, *after))


def others(dims: int, *kept: int) -> tuple[int, ...]:
    """All of ``range(dims)`` but ``kept``."""
    return tuple(dim for dim in range(dims) if dim not in kept)


class _DimGrouper(Grouper):
    """Slices along one dimension."""

    dim: int

    def check(self, shape: Sequence[int], where: str) -> None:
        at_least_dims(shape, self.dim + 1, where, self)

    def group_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (shape[self.dim],)

    def group_size(self, shape: Sequence[int]) -> int:
        return math.prod(shape) // max(1, shape[self.dim])

    def blocks(self, weight_W: Tensor) -> list[GroupView]:
        return [GroupView(weight_W, others(weight_W.dim(), self.dim))]

    def labels(self, shape: Sequence[int]) -> Labels:
        return along(shape, self.dim, torch.arange(shape[self.dim]), shape[self.dim])


@register("grouper", "Dim0Grouper", "dim0grouper")
@dataclass(frozen=True)
class Dim0Grouper(_DimGrouper):
    """Rows: everything that makes one output (a filter of a convolution)."""

    dim = 0


@register("grouper", "Dim1Grouper", "dim1grouper")
@dataclass(frozen=True)
class Dim1Grouper(_DimGrouper):
    """Columns: everything that reads one input. A convolution has as many as it has input channels."""

    dim = 1


@register("grouper", "ElemGrouper", "elemgrouper")
@dataclass(frozen=True)
class ElemGrouper(Grouper):
    """Each element alone."""

    def check(self, shape: Sequence[int], where: str) -> None:
        return None

    def group_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)

    def group_size(self, shape: Sequence[int]) -> int:
        return 1

    def blocks(self, weight_W: Tensor) -> list[GroupView]:
        return [GroupView(weight_W, ())]

    def labels(self, shape: Sequence[int]) -> Labels:
        return tuple(torch.arange(size) for size in shape), tuple(shape)


@register("grouper", "LayerGrouper", "layergrouper")
@dataclass(frozen=True)
class LayerGrouper(Grouper):
    """The whole tensor as one group."""

    def check(self, shape: Sequence[int], where: str) -> None:
        return None

    def group_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return ()

    def group_size(self, shape: Sequence[int]) -> int:
        return math.prod(shape)

    def blocks(self, weight_W: Tensor) -> list[GroupView]:
        return [GroupView(weight_W, others(weight_W.dim()))]

    def labels(self, shape: Sequence[int]) -> Labels:
        return tuple(None for _ in shape), tuple(1 for _ in shape)


@register("grouper", "KElementGrouper", "kelementgrouper")
@dataclass(frozen=True)
class KElementGrouper(Grouper):
    """``k`` consecutive elements of each row, along the input channels (dimension 1) of a matrix or a convolution.

    The last group of a row that ``k`` does not divide counts as padded with zeros.

    Args:
        k: elements of a group.

    Raises:
        ConfigError: ``k`` is below 1.
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"k: {self.k} is not allowed. Allowed: a whole number of 1 or more")

    def check(self, shape: Sequence[int], where: str) -> None:
        at_least_dims(shape, 1, where, self)

    def group_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        axis = _axis(shape)
        return (*shape[:axis], -(-shape[axis] // self.k), *shape[axis + 1 :])

    def group_size(self, shape: Sequence[int]) -> int:
        return self.k

    def blocks(self, weight_W: Tensor) -> list[GroupView]:
        axis = _axis(weight_W.shape)
        whole, rest = divmod(weight_W.shape[axis], self.k)
        every = (slice(None),) * axis
        found = []
        if whole:
            view = split_dim(weight_W.narrow(axis, 0, whole * self.k), axis, (whole, self.k))
            found.append(GroupView(view, (axis + 1,), (*every, slice(0, whole)) if rest else ()))
        if rest:
            view = split_dim(weight_W.narrow(axis, whole * self.k, rest), axis, (1, rest))
            found.append(GroupView(view, (axis + 1,), (*every, slice(whole, whole + 1))))
        return found

    def labels(self, shape: Sequence[int]) -> Labels:
        axis = _axis(shape)
        labels = [torch.arange(size) for size in shape]
        labels[axis] //= self.k
        return tuple(labels), self.group_shape(shape)


def _axis(shape: Sequence[int]) -> int:
    return min(1, len(shape) - 1)


@register("grouper", "ConvFilterGrouper", "convfiltergrouper")
@dataclass(frozen=True)
class ConvFilterGrouper(Grouper):
    """The kernels of a convolution: one group for each pair of output and input channel."""

    def check(self, shape: Sequence[int], where: str) -> None:
        at_least_dims(shape, 3, where, self)

    def group_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape[:2])

    def group_size(self, shape: Sequence[int]) -> int:
        return math.prod(shape[2:])

    def blocks(self, weight_W: Tensor) -> list[GroupView]:
        return [GroupView(weight_W, others(weight_W.dim(), 0, 1))]

    def labels(self, shape: Sequence[int]) -> Labels:
        rest = len(shape) - 2
        return (torch.arange(shape[0]), torch.arange(shape[1]), *[None] * rest), (*shape[:2], *[1] * rest)
