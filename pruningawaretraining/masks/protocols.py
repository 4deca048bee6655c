"""The interface of writers of masked entries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

Ids = set[int]
"""Of parameters, by ``id``."""


class Writer(Protocol):
    """The masked entries of a grouping's parameters."""

    device: torch.device

    def build(self, keep_G: Tensor, kept_by_set: list[int]) -> None:
        """Take new masks, which lie on ``device``; ``kept_by_set`` counts the groups of each set that are kept."""

    def parameters(self) -> list[Tensor]:
        """Parameters with masked entries, each once."""

    def clear_weights(self, only: Ids | None = None) -> None:
        """Set masked weights to exactly 0: of the parameters with these ids, or of all."""

    def restore(self) -> dict[int, int]:
        """Set masked weights to 0; return id of each parameter -> how many were not 0, where any was."""

    def clear_gradients(self, only: Ids | None = None) -> None:
        """Set the gradients of masked weights to 0: of the parameters with these ids, or of all."""

    def accumulated(self, parameter: Tensor) -> None:
        """A gradient has been accumulated: its masked entries go to 0, at once or by :meth:`settle`."""

    def settle(self) -> None:
        """Do what :meth:`accumulated` has left for later: gradients are about to be used."""

    def factors(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Parameters with masked entries, each with a factor that broadcasts to it: 0 where masked, 1 elsewhere."""

    def masked_weights(self) -> int:
        """How many weights are masked."""
