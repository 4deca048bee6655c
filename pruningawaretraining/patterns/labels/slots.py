"""Slots: indices of dimensions of parameters and buffers, which of them go together, and which have to stay.

An *array* holds the slots that the entries of a tensor belong to. It broadcasts to the tensor's shape: it has size 1
along every dimension in which it does not vary. ``NOBODY`` marks entries that belong to no slot, such as padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

Array = np.ndarray
NOBODY = -1
ROUNDS = 20


@dataclass(frozen=True, eq=False)
class Owner:
    """The slots of one dimension of a tensor.

    Args:
        name, tensor, dim: the tensor, its name in the model, and the dimension.
        first: number of the first slot.
    """

    name: str
    tensor: Tensor
    dim: int
    first: int

    @property
    def slots(self) -> Array:
        found: Array = np.arange(self.first, self.first + self.tensor.shape[self.dim])
        return found


@dataclass(frozen=True, eq=False)
class Lock:
    """Slots that have to stay, and why."""

    slots: Array
    reason: str


class Slots:
    """All slots of a model, the pairs that go together, and the reasons why some stay."""

    def __init__(self) -> None:
        self.total = 0
        self.owners: list[Owner] = []
        self.locks: list[Lock] = []
        self.rectangles: list[Array] = []
        self._pairs: list[tuple[Array, Array]] = []
        self._starts: list[int] = []

    def new(self, count: int) -> Array:
        """Fresh slots that no tensor owns: a dimension whose size the code computes."""
        first, self.total = self.total, self.total + count
        self._starts.append(first)
        return np.arange(first, self.total)

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Array, ...]]:
        """Slots for every dimension of more than one index of every tensor; their arrays by the tensors' names."""
        found = {}
        for name, tensor in tensors.items():
            arrays = []
            for dim, size in enumerate(tensor.shape):
                if size > 1:
                    slots = self.new(size)
                    self.owners.append(Owner(name, tensor, dim, int(slots[0])))
                    shape = [1] * tensor.dim()
                    shape[dim] = size
                    arrays.append(slots.reshape(shape))
            found[name] = tuple(arrays)
        return found

    def join(self, one: Array, other: Array) -> None:
        """The slots at equal places go together."""
        a, b = (part.reshape(-1) for part in np.broadcast_arrays(one, other))
        both = (a != b) & (a >= 0) & (b >= 0)
        if both.any():
            self._pairs.append((a[both], b[both]))

    def tie(self, array: Array, dims: Iterable[int]) -> Array:
        """Slots that differ along some dimensions alone go together; the array without variation along them."""
        dims = tuple(dim for dim in dims if array.shape[dim] > 1)
        if not dims:
            return array
        least: Array = array.max(axis=dims, keepdims=True)
        self.join(array, least)
        return least

    def lock(self, array: Array, reason: str) -> None:
        """These slots have to stay."""
        slots = np.unique(array)
        self.locks.append(Lock(slots[slots >= 0], reason))

    def cut(self, array: Array) -> None:
        """Along each dimension the same number has to stay everywhere: an array of rows that are handled alike."""
        if len(varying(array)) > 1:
            self.rectangles.append(array)

    def owner_numbers(self, slots: Array) -> Array:
        """For each slot, which run of slots it is of: two of the same dimension of one tensor are equal."""
        numbers: Array = np.searchsorted(np.asarray(self._starts), slots, side="right")
        return numbers

    def components(self) -> Array:
        """For every slot, the number of those that go together; every cut is a rectangle then."""
        for _ in range(ROUNDS):
            numbers = self._connected()
            before = len(self._pairs)
            for array in self.rectangles:
                now = np.where(array >= 0, numbers[array], NOBODY)
                differing = varying(compressed(now))
                if len(differing) > 1:
                    self.tie(array, differing[:-1])
            if len(self._pairs) == before:
                break
        return numbers

    def _connected(self) -> Array:
        none = np.zeros(0, dtype=np.int64)
        rows = np.concatenate([none, *(a for a, _ in self._pairs)])
        columns = np.concatenate([none, *(b for _, b in self._pairs)])
        links = coo_matrix((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(self.total, self.total))
        numbers: Array = connected_components(links, directed=False)[1]
        return numbers


def varying(array: Array) -> tuple[int, ...]:
    """The dimensions along which an array varies."""
    return tuple(dim for dim, size in enumerate(array.shape) if size > 1)


def compressed(array: Array) -> Array:
    """The array without dimensions along which all is equal."""
    for dim in varying(array):
        first = np.take(array, [0], axis=dim)
        if (array == first).all():
            array = first
    return array


def aligned(array: Array, dims: int) -> Array:
    """The array with leading dimensions of 1, as broadcasting has it."""
    return array.reshape((1,) * (dims - array.ndim) + array.shape)


def pattern(array: Array) -> bytes:
    """Which entries are equal, whatever they are."""
    inverse: Array = np.unique(array, return_inverse=True)[1]
    _, first, order = np.unique(inverse.reshape(-1), return_index=True, return_inverse=True)
    return bytes(np.argsort(np.argsort(first))[order].astype(np.int32).tobytes())


Reason = Callable[[str], str]
"""Completes a reason by layer and line."""
Arrays = Sequence[Array]
