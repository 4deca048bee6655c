"""Hooks in the steps of optimizers, and what these know of masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class HasApply(Protocol):
    """Masks, as far as a step knows them."""

    def apply(self) -> None:
        """Zero what is masked."""

    def before_step(self, optimizer: torch.optim.Optimizer | None, ready: bool = True) -> None:
        """An optimizer is about to step; None for one that has stepped without hooks."""

    def after_step(self, only: set[int] | None = None) -> None:
        """Weights have moved: those of the parameters with these ids, or any."""


class OptimizerEvents(Protocol):
    """Callbacks at the moments of a real step."""

    def on_round(self) -> None:
        """A real step begins: gradients are complete, no weight has moved yet."""

    def on_gradients(self, scale: Tensor | float, only: set[int] | None) -> None:
        """Gradients are about to be used: add what belongs to them.

        Args:
            scale: what they are still multiplied with (a loss scale that is not yet divided out).
            only: ids of the parameters that are meant; None for all.
        """

    def on_moved(self) -> None:
        """Weights have moved."""

    @property
    def masks(self) -> Sequence[HasApply]:
        """Masks to be applied now."""

    def on_stepped(self) -> None:
        """Weights have moved, and masks are applied."""
