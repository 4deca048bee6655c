"""Dynamics: what masked weights do until they are settled.

Shape suffixes: ``_G`` groups of one rule, ``_N`` groups of one set.

A dynamic declares whether masks are nested, whether masked weights live on and whether its events look at their
gradients; it chooses the masks of an event, and may act after every step. Each is one dataclass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from pruningawaretraining.errors import check_declared
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.registry import checked_by, register


@dataclass(frozen=True, eq=False)
class Event:
    """An event of a rule, as a dynamic sees it.

    Args:
        grouping: the rule's groups.
        keep_G: its masks before the event.
        scores_G: importance of its groups; of dense weights where masked ones live on.
        number: how many events there have been.
        last: whether it is the last of the schedule.
        progress: how far the schedule has come, 1 at the last event.
        sparsity: what the schedule asks for.
        gradient_G: sums of squared gradients of the groups, where the dynamic asks for them; None where the training
            ended before there were any.
        elapsed: fraction of the time from the rule's first event to its last that is over.
    """

    grouping: Grouping
    keep_G: Tensor
    scores_G: Tensor
    number: int
    last: bool
    progress: float
    sparsity: float
    gradient_G: Tensor | None = None
    elapsed: float = 0.0


class Held(Protocol):
    """Masks, as far as a dynamic acts on them after a step (see :class:`~pruningawaretraining.masks.masks.Masks`)."""

    grouping: Grouping
    steps: int
    next_G: Tensor | None
    choose: Callable[[], Tensor] | None

    @property
    def keep_G(self) -> Tensor:
        """True for groups that are kept."""

    def set(self, keep_G: Tensor) -> None:
        """Take new masks."""

    def exchange(self, keep_G: Tensor) -> None:
        """Take new masks that keep as many groups of every set."""


FLAGS = ("nested", "lives", "listens", "removable", "windows", "rewinds", "alternates")
"""What a dynamic declares with true or false."""


class Dynamic:
    """The defaults of a dynamic: masks are final, and masked weights are 0.

    Attributes:
        nested: whether what is masked stays so at later events.
        lives: whether the dense values of masked weights are kept, and masks are chosen by them.
        listens: whether its events look at the gradients of masked weights.
        removable: whether it works for groups that can be removed physically.
        windows: whether it works for N:M.
        rewinds: whether its events may go back to the weights that there were before step ``to``.
        alternates: whether every other event lifts the masks, but for the last.
    """

    nested: ClassVar[bool] = True
    lives: ClassVar[bool] = False
    listens: ClassVar[bool] = False
    removable: ClassVar[bool] = True
    windows: ClassVar[bool] = True
    rewinds: ClassVar[bool] = False
    alternates: ClassVar[bool] = False
    decay: float = 0.0
    to: int = 0

    def __init_subclass__(cls) -> None:
        """Coupled groups ask no dynamic for masks: one that chooses or defers them works inside layers only."""
        super().__init_subclass__()
        if cls.choose is not Dynamic.choose or cls.defers is not Dynamic.defers:
            cls.removable = False

    def choose(self, event: Event, pick: Callable[[], Tensor]) -> Tensor:
        """The masks of an event.

        Args:
            event: where the rule stands.
            pick: gives the masks that the rule's allocation chooses by the scores.
        """
        return pick()

    def defers(self, masks: Held, keep_G: Tensor) -> bool:
        """Whether the masks of an event are put in force later, by :meth:`stepped`."""
        return False

    def hears(self, number: int, last: bool) -> bool:
        """Whether an event waits for the gradients of masked weights, in the step after it.

        Args:
            number: how many events there have been.
            last: whether it is the last of the schedule, which no further step may follow.
        """
        return self.listens and number > 0

    def stepped(self, masks: Held) -> None:
        """A step has moved the weights; its dense values are still in the parameters."""

    def goes_back(self, last: bool) -> bool:
        """Whether an event goes back to earlier weights."""
        return False


@checked_by("dynamic")
def check_dynamic(name: str, entry: Any) -> None:
    """Refuse a dynamic that declares anything but true or false.

    Raises:
        ConfigError: it names the dynamic.
    """
    for key in FLAGS:
        value = getattr(entry, key, False)
        check_declared(isinstance(value, bool), "dynamic", name, key, value, "True, False")


@register("dynamic", "frozen")
@dataclass(frozen=True)
class Frozen(Dynamic):
    """Masked weights are 0 for good."""


@register("dynamic", "straight_through", "ste", "sr_ste")
@dataclass(frozen=True)
class StraightThrough(Dynamic):
    """Dense weights train on, the forward pass sees masked ones (Zhou et al. 2021, SR-STE).

    Args:
        decay: pulls masked weights towards 0: ``grad += decay * w`` where masked. 0.0002 in the paper.
        refresh: optimizer steps between two choices of masks by the weights that there are then, at the sparsity
            reached; 0 for events only. The paper chooses anew in every step.
    """

    nested: ClassVar[bool] = False
    lives: ClassVar[bool] = True

    decay: float = 2e-4
    refresh: int = 10

    def __post_init__(self) -> None:
        _at_least(0, decay=self.decay, refresh=self.refresh)

    def stepped(self, masks: Held) -> None:
        """Choose the masks anew every ``refresh`` steps."""
        if self.refresh and masks.choose is not None and masks.steps % self.refresh == 0:
            masks.exchange(masks.choose())


def _at_least(least: float, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= least):
            raise ValueError(f"{name}: {value!r} must be {least} or more")


FROZEN = Frozen()


def top_of_sets(scores_G: Tensor, grouping: Grouping, kept_by_set: list[int]) -> Tensor:
    """True for the highest scores of every set, as many as are to be kept; the first among equals on the CPU."""
    keep_G = torch.zeros_like(scores_G, dtype=torch.bool)
    for one, count in zip(grouping.sets, kept_by_set, strict=True):
        best = torch.topk(scores_G[one.start : one.stop], count, sorted=False).indices
        keep_G[one.start : one.stop].index_fill_(0, best, True)
    return keep_G
