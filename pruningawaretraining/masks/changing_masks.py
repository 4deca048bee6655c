"""Dynamics whose masks change at events: regrowth, dense and sparse phases, fading.

Shape suffixes: ``_G`` groups of one rule, ``_N`` groups of one set, ``_S`` sets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.groups.lowest import counts_of
from pruningawaretraining.groups.views import scale_groups
from pruningawaretraining.masks.dynamics import Dynamic, Event, Held, top_of_sets
from pruningawaretraining.registry import register

SLACK = 1e-9


@register("dynamic", "regrow", "rigl", "set")
@dataclass(frozen=True)
class Regrow(Dynamic):
    """At every event after the first, the lowest weights go and as many others come back, from 0.

    By gradient: Evci et al. 2020, RigL. At random: Mocanu et al. 2018, SET. Those that have just gone may come back
    themselves, as there: weights grow among all but those that have stayed.

    Args:
        by: which weights come back: those of the largest "gradient", or "random" ones.
        fraction: alpha in the paper: alpha / 2 (1 + cos(pi t / T)) of the weights that are left are exchanged at time t
            after the rule's first event, T being the time of its last one.
        layers: sparsity of each layer: "erk" leaves thin layers denser, "uniform" gives all the same, "criterion"
            leaves it to the rule's allocation, at the first event and wherever the schedule asks for more.
        seed: of the random choice.
    """

    nested: ClassVar[bool] = False
    listens: ClassVar[bool] = True
    removable: ClassVar[bool] = False
    windows: ClassVar[bool] = False

    by: str = "gradient"
    fraction: float = 0.3
    layers: str = "erk"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction: {self.fraction!r} must be in (0, 1]")
        for name, allowed in (("by", ("gradient", "random")), ("layers", ("erk", "uniform", "criterion"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not known. Allowed: {', '.join(allowed)}")

    def hears(self, number: int, last: bool) -> bool:
        """The first event only drops, and so does the last: the fraction has fallen to 0 by then."""
        return self.by == "gradient" and number > 0 and not last

    def choose(self, event: Event, pick: Callable[[], Tensor]) -> Tensor:
        """Drop and grow in every layer; the first event only drops, and so does one whose gradients never came."""
        if event.number == 0:
            if self.layers == "criterion":
                return pick()
            return top_of_sets(event.scores_G, event.grouping, self._kept(event))
        heard = event.gradient_G is not None or not self.hears(event.number, event.last)
        fraction = self.fraction / 2 * (1 + math.cos(math.pi * event.elapsed)) if heard else 0.0
        keep_G = event.keep_G.clone()
        grown_G = self._growth(event).to(keep_G.device)
        before = kept_by_set(event)
        if self.layers != "criterion":
            after = self._kept(event)
        elif round((1 - event.sparsity) * event.grouping.size) < sum(before):  # the schedule asks for more
            after = counts_of(pick(), [one.size for one in event.grouping.sets])
        else:
            after = before
        for one, left, count in zip(event.grouping.sets, before, after, strict=True):
            mine = slice(one.start, one.stop)
            keep_G[mine] = exchanged(event.keep_G[mine], event.scores_G[mine], grown_G[mine], left, count, fraction)
        return keep_G

    def _growth(self, event: Event) -> Tensor:
        """The values that rank the masked groups."""
        if self.by == "gradient" and event.gradient_G is not None:
            return event.gradient_G
        generator = torch.Generator().manual_seed(self.seed + event.number)
        return torch.rand(event.grouping.size, generator=generator)

    def _kept(self, event: Event) -> list[int]:
        """How many groups each set keeps at an event, by the shapes of the layers."""
        sizes = [one.size for one in event.grouping.sets]
        density_S = [1 - event.sparsity] * len(sizes)
        if self.layers == "erk":
            density_S = erk(shapes_of(event.grouping), sizes, 1 - event.sparsity)
        return [round(density * size) for density, size in zip(density_S, sizes, strict=True)]


def kept_by_set(event: Event) -> list[int]:
    """How many groups each set has kept before an event; the host waits once."""
    return counts_of(event.keep_G, [one.size for one in event.grouping.sets])


def exchanged(keep_N: Tensor, scores_N: Tensor, grown_N: Tensor, left: int, count: int, fraction: float) -> Tensor:
    """The mask of one set after an exchange.

    As in RigL, weights grow among all that are masked once the lowest have gone, so that one that has just gone may
    come back; it keeps its value then, others begin at 0.

    Args:
        keep_N: its mask before.
        scores_N: importance; the lowest of those that are kept go.
        grown_N: the highest of those that are masked then come back.
        left: how many are kept before.
        count: how many are kept afterwards.
        fraction: of these, how many are exchanged, rounded down.
    """
    stay = max(min(left, count) - int(fraction * count + SLACK), 0)
    survivors = torch.topk(torch.where(keep_N, scores_N, -torch.inf), stay, sorted=False).indices
    next_N = torch.zeros_like(keep_N).index_fill_(0, survivors, True)
    grown = torch.topk(torch.where(next_N, -torch.inf, grown_N), count - stay, sorted=False).indices
    return next_N.index_fill_(0, grown, True)


def shapes_of(grouping: Grouping) -> list[tuple[int, ...]]:
    """The shape of the weight of every set, for groupings with one weight each."""
    return [tuple(member.parameter.shape) for member in grouping.members]


def erk(shapes: Sequence[tuple[int, ...]], sizes: Sequence[int], density: float) -> list[float]:
    """The density of every layer: in proportion to the sum of its dimensions over their product (Erdos-Renyi kernel).

    Layers that would have to be more than dense are dense, and the others share what is left.

    Args:
        shapes: of the weights.
        sizes: groups of each.
        density: fraction of all groups that is kept.
    """
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    dense: set[int] = set()
    while True:
        budget = density * sum(sizes) - sum(sizes[number] for number in dense)
        weight = sum(raw[number] * sizes[number] for number in range(len(sizes)) if number not in dense)
        scale = budget / weight if weight else 0.0
        over = {number for number in range(len(sizes)) if number not in dense and raw[number] * scale > 1}
        if not over:
            return [1.0 if number in dense else raw[number] * scale for number in range(len(sizes))]
        dense |= over


@register("dynamic", "alternate", "acdc", "ac_dc")
@dataclass(frozen=True)
class Alternate(Dynamic):
    """Sparse and dense phases in turn (Peste et al. 2021, AC/DC): the first event masks, the second lifts the masks,
    and so on; the last one masks for good. A phase is as long as the rule's ``every``.
    """

    nested: ClassVar[bool] = False
    removable: ClassVar[bool] = False
    alternates: ClassVar[bool] = True

    def choose(self, event: Event, pick: Callable[[], Tensor]) -> Tensor:
        """Mask at events 0, 2, 4 and so on, and at the last; lift the masks at the others."""
        return pick() if event.last or event.number % 2 == 0 else torch.ones_like(event.keep_G)


@register("dynamic", "soft", "fade")
@dataclass(frozen=True)
class Soft(Dynamic):
    """Groups that an event chooses are not masked at once: they fade by a factor at every step, and are masked then.

    Until then they do not count as pruned.

    Args:
        factor: by which weights shrink after every optimizer step, in [0, 1).
        steps: optimizer steps until they are masked.
    """

    removable: ClassVar[bool] = False

    factor: float = 0.9
    steps: int = 50

    def __post_init__(self) -> None:
        if not 0 <= self.factor < 1:
            raise ValueError(f"factor: {self.factor!r} must be in [0, 1)")
        if not self.steps >= 1:
            raise ValueError(f"steps: {self.steps!r} must be 1 or more")

    def defers(self, masks: Held, keep_G: Tensor) -> bool:
        """Begin to fade what is to go; what was fading before is masked now."""
        if masks.next_G is not None:
            masks.set(masks.next_G)
        masks.next_G, masks.steps = keep_G, 0
        return True

    def stepped(self, masks: Held) -> None:
        """Fade, and mask after the last step."""
        if masks.next_G is None:
            return
        masks.next_G = masks.next_G.to(masks.keep_G.device)
        fading_G = masks.keep_G & ~masks.next_G
        for member in masks.grouping.members:
            chosen_S = fading_G[member.offset : member.offset + member.n_slots]
            scale_groups(member, member.parameter.detach(), chosen_S, self.factor)
        if masks.steps >= self.steps:
            next_G, masks.next_G = masks.next_G, None
            masks.set(next_G)


@register("dynamic", "rewind", "lottery_ticket")
@dataclass(frozen=True)
class Rewind(Dynamic):
    """At an event weights, buffers and optimizer state go back to those of an earlier step, and the masks stay on
    (Frankle et al. 2020; lottery tickets with ``to: 0``). The learning rate is the loop's own.

    Args:
        to: optimizer steps before the one whose weights are kept.
        at: "events": at every event, as in iterative pruning; "last": at the last one only.
    """

    rewinds: ClassVar[bool] = True

    to: int = 0
    at: str = "events"

    def __post_init__(self) -> None:
        if not self.to >= 0:
            raise ValueError(f"to: {self.to!r} must be 0 or more")
        if self.at not in ("events", "last"):
            raise ValueError(f"at: {self.at!r} is not known. Allowed: events, last")

    def goes_back(self, last: bool) -> bool:
        """Whether an event goes back."""
        return last or self.at == "events"
