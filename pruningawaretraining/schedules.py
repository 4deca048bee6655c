"""Schedules: how much of the way to the final sparsity has been gone at progress t in [0, 1].

A schedule is a function ``(t, start, final) -> sparsity`` with ``start <= final``; it returns ``start`` at t = 0 and
exactly ``final`` at t = 1 (``one_shot`` returns ``final`` everywhere). A :class:`Timeline` says at which epochs or
steps a rule has events, and which sparsity each asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from pruningawaretraining.registry import calling, check_returned, lookup, register

LEAST_LEFT = 0.01
"""Rest of an exponential schedule towards 1 just before its end."""

FRACTION = "a number in [0, 1], from start to final"
ROUNDING = 1e-9
"""Allowance for rounding in a fraction or a moment: 0.1 epochs of 30 steps are 3 steps."""

TRIED = 0.5
"""Final sparsity that a schedule is tried with."""
POINTS = 8
"""Parts of the way from 0 to 1 at whose ends a schedule is tried."""

Schedule = Callable[[float, float, float], float]


@register("schedule", "one_shot", "oneshot", "constant")
def one_shot(t: float, start: float, final: float) -> float:
    """``final`` at once."""
    return final


@register("schedule", "linear")
def linear(t: float, start: float, final: float) -> float:
    """``start + (final - start) t``."""
    return start + (final - start) * t


@register("schedule", "cosine", "cos")
def cosine(t: float, start: float, final: float) -> float:
    """``start + (final - start) (1 - cos(pi t / 2))``: slow, then fast."""
    return start + (final - start) * (1 - math.cos(math.pi * t / 2))


@register("schedule", "exponential", "exp", "geometric")
def exponential(t: float, start: float, final: float) -> float:
    """``1 - (1 - start) ((1 - final) / (1 - start))^t``: the same fraction of what is left at every event.

    Nothing can be left of which every event takes the same fraction, so a ``final`` of 1 is approached as 0.99 and
    reached at t = 1.
    """
    if start >= 1:
        return start
    left = max(1 - final, min(LEAST_LEFT, 1 - start)) / (1 - start)
    return 1 - (1 - start) * float(left**t)


@register("schedule", "cube")
def cube(t: float, start: float, final: float) -> float:
    """``start + (final - start) t^3``: slow, then fast."""
    return start + (final - start) * t**3


@register("schedule", "cubic")
def cubic(t: float, start: float, final: float) -> float:
    """``final + (start - final) (1 - t)^3``: fast, then slow (Zhu and Gupta 2017)."""
    return final + (start - final) * (1 - t) ** 3


@register("schedule", "inverse_cubic")
def inverse_cubic(t: float, start: float, final: float) -> float:
    """``start + (final - start) (1 - (1 - t)^(1/3))``: slow, then very fast."""
    return start + (final - start) * (1 - float((1 - t) ** (1 / 3)))


def sparsity_at(name: str, t: float, start: float = 0.0, final: float = 1.0) -> float:
    """The sparsity that the schedule ``name`` asks for at progress ``t``.

    Args:
        name: a registered schedule.
        t: progress, clipped to [0, 1].
        start, final: sparsity at t = 0 and t = 1, each in [0, 1], ``start <= final``.

    Returns:
        A value between ``start`` and ``final``; exactly ``final`` from t = 1 on.

    Raises:
        ConfigError: the schedule is unknown.
        ExtensionError: the schedule raises, or returns something else.
        ValueError: ``start`` or ``final`` is out of range.
    """
    schedule: Schedule = lookup("schedule", name)
    if not 0 <= start <= final <= 1:
        raise ValueError(f"schedule {name!r}: need 0 <= start <= final <= 1, got start={start}, final={final}")
    t = min(max(t, 0.0), 1.0)
    return final if t >= 1 else min(max(_value(schedule, t, start, final), start), final)


def _value(schedule: Schedule, t: float, start: float, final: float) -> float:
    with calling("schedule", schedule, FRACTION):
        value: Any = schedule(t, start, final)
    number = isinstance(value, Real) and not isinstance(value, bool)
    good = number and -ROUNDING <= value <= 1 + ROUNDING
    check_returned(good, "schedule", schedule, value, FRACTION, f"{value!r:.80} at progress {t:g}")
    return float(value)


def check_schedule(name: str) -> None:
    """Try a schedule from 0 to :data:`TRIED` at :data:`POINTS` and one moments.

    Raises:
        ConfigError: the schedule is unknown.
        ExtensionError: it raises, returns something else, falls, or does not end at the final sparsity.
    """
    schedule: Schedule = lookup("schedule", name)
    times = [number / POINTS for number in range(POINTS + 1)]
    values = [_value(schedule, t, 0.0, TRIED) for t in times]
    from_to = f"(from 0 to {TRIED:g})"
    for t, later, value, after in zip(times, times[1:], values, values[1:], strict=False):
        shown = f"{value:g} at progress {t:g} and {after:g} at progress {later:g} {from_to}"
        check_returned(after >= value - ROUNDING, "schedule", schedule, value, "values that never fall", shown)
    shown = f"{values[-1]} at progress 1 {from_to}"
    final = abs(values[-1] - TRIED) <= ROUNDING
    check_returned(final, "schedule", schedule, values[-1], "exactly final at progress 1", shown)


PRESENT = "present"
"""``initial`` of a stretch that starts from the sparsity that the weights have."""


@dataclass(frozen=True)
class Stretch:
    """One stretch of a schedule: events from ``start`` on, every ``every``, up to ``end``.

    Args:
        start, end, every: in epochs or steps; fractions of an epoch are allowed.
        schedule: a registered schedule.
        initial: sparsity of the event at ``start``; from there the schedule goes by the time that has passed, and
            ``end`` has an event in any case. ``"present"``: the sparsity that is there. None: from what is there, the
            first event taking its first part: event k of n is at progress k / n.
        final: sparsity of the last event.
        layers: entries of the layers that it prunes; None for all of the rule's.
    """

    start: float
    end: float
    every: float
    schedule: str
    initial: float | str | None
    final: float
    layers: tuple[str, ...] | None = None

    def ticks(self, scale: int) -> tuple[int, int, int]:
        """(first event, distance, last event) in ticks, ``scale`` of them to an epoch."""
        first, distance = _tick(self.start * scale), max(1, _tick(self.every * scale))
        end = max(first, _tick(self.end * scale))
        return first, distance, end if self.initial is not None else end - (end - first) % distance

    def progress(self, now: int, scale: int) -> float:
        """How far the stretch has gone with the event at tick ``now``: 1 at its last event."""
        first, distance, last = self.ticks(scale)
        if now >= last:
            return 1.0
        if self.initial is None:
            return ((now - first) // distance + 1) / ((last - first) // distance + 1)
        return (now / scale - self.start) / (self.end - self.start)

    def sparsity(self, now: int, scale: int, before: float) -> float:
        """The sparsity that the event at tick ``now`` asks for, ``before`` being there at its first event."""
        there = min(before, self.final)
        initial = self.initial if isinstance(self.initial, (int, float)) else there
        return sparsity_at(self.schedule, self.progress(now, scale), initial, self.final)


def _tick(moment: float) -> int:
    return math.ceil(moment - ROUNDING)


@dataclass(frozen=True)
class Asked:
    """Demands of an event.

    Args:
        sparsity: of the layers.
        layers: entries of the layers that it is about; None for all of the rule's.
    """

    sparsity: float
    layers: tuple[str, ...] | None


@dataclass(frozen=True)
class Timeline:
    """When a rule has its events, and how far each goes.

    Args:
        unit: what the stretches count, "epoch" or "step".
        stretches: in the order of time, none before the end of the one before it.
        steps: optimizer steps of an epoch, where that is known.
    """

    unit: str
    stretches: tuple[Stretch, ...]
    steps: int | None = None

    def beginning(self, now: int) -> Timeline:
        """The same with the first event at a tick, and no later than its last one."""
        first = replace(self.stretches[0], start=min(now / self.scale, self.stretches[0].end))
        return replace(self, stretches=(first, *self.stretches[1:]))

    @property
    def fractional(self) -> bool:
        """Whether it counts in fractions of epochs."""
        moments = (moment for one in self.stretches for moment in (one.start, one.end, one.every))
        return self.unit == "epoch" and any(moment != int(moment) for moment in moments)

    @property
    def counts(self) -> str:
        """Unit of its ticks: "step" also for fractions of epochs, once the steps of an epoch are known; "epoch"."""
        return "step" if self.fractional and self.steps else self.unit

    @property
    def scale(self) -> int:
        """Ticks of one unit."""
        return self.steps if self.fractional and self.steps else 1

    @property
    def first(self) -> int:
        """The tick of the first event."""
        return self.stretches[0].ticks(self.scale)[0]

    @property
    def last(self) -> int:
        """The tick of the last event."""
        return self.stretches[-1].ticks(self.scale)[2]

    def is_event(self, now: int) -> bool:
        """Whether a tick has an event; after the last one those that are still due go on in the same rhythm."""
        if now < self.first:
            return False
        one = self.at(now)
        first, distance, last = one.ticks(self.scale)
        regular = (now - first) % distance == 0 and (now <= last or one is self.stretches[-1])
        return regular or any(now == each.ticks(self.scale)[2] for each in self.stretches)

    def at(self, now: int) -> Stretch:
        """The stretch that decides at a tick: the last one that has begun."""
        begun = [one for one in self.stretches if one.ticks(self.scale)[0] <= now]
        return begun[-1] if begun else self.stretches[0]

    def sparsity(self, now: int, before: float = 0.0) -> float:
        """The sparsity that the event at a tick asks for, never less than earlier stretches of the same layers reached:
        masks are nested.

        Args:
            now: the tick.
            before: sparsity that is there at the first event.
        """
        one = self.at(now)
        earlier = self.stretches[: self.stretches.index(one)]
        asked = one.sparsity(now, self.scale, earlier[-1].final if earlier else before)
        return max([asked, *(each.final for each in earlier if each.layers == one.layers)])

    def asked(self, now: int, before: float = 0.0) -> list[Asked]:
        """Demands of the event at a tick; the end of a stretch may come together with the start of the next one,
        which is about other layers.

        Args:
            now: the tick.
            before: sparsity that is there at the first event.
        """
        one = self.at(now)
        ending = [each for each in self.stretches[: self.stretches.index(one)] if each.ticks(self.scale)[2] == now]
        parts = [Asked(each.final, each.layers) for each in ending if each.layers != one.layers]
        return [*parts, Asked(self.sparsity(now, before), one.layers)]

    def ends_before(self, now: int) -> list[int]:
        """The last ticks of the stretches that are over before the one that decides at a tick."""
        return [one.ticks(self.scale)[2] for one in self.stretches[: self.stretches.index(self.at(now))]]

    def progress(self, now: int) -> float:
        """How far the stretch that decides at a tick has gone with the event there, 1 at its last event."""
        return self.at(now).progress(now, self.scale)

    def events(self) -> list[int]:
        """The ticks of all events, in order."""
        return [now for now in range(self.first, self.last + 1) if self.is_event(now)]
