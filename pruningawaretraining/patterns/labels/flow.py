"""Which parameters the outputs of a forward pass are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Places = tuple[StorageWeakRef, ...]


class Flow:
    """Notes what every operation reads and writes, by storage: a view is one with what it looks at."""

    def __init__(self) -> None:
        self._steps: list[tuple[Places, Places]] = []

    def note(self, read: Iterable[Tensor], written: Iterable[Tensor]) -> None:
        """One operation, in the order in which they run."""
        self._steps.append((_places(read), _places(written)))

    def sources(self, outputs: Iterable[Tensor], tensors: Mapping[str, Tensor]) -> set[str]:
        """The names of those tensors that outputs, or numbers that the code looked at, are made of."""
        found = set(_places(outputs))
        for read, written in reversed(self._steps):
            if not written or not found.isdisjoint(written):
                found.update(read)
        return {name for name, one in tensors.items() if not found.isdisjoint(_places([one]))}


def _places(tensors: Iterable[Tensor]) -> Places:
    strided = (one.untyped_storage() for one in tensors if one.layout is torch.strided)
    return tuple(StorageWeakRef(one) for one in strided)  # type: ignore[no-untyped-call]
