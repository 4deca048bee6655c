"""Schedules: how much of the way to the final sparsity has been gone at progress t in [0, 1].

A schedule is a function ``(t, start, final) -> sparsity`` with ``start <= final``; it returns ``start`` at t = 0 and
exactly ``final`` at t = 1 (``one_shot`` returns ``final`` everywhere).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pruningawaretraining.registry import lookup, register

LEAST_LEFT = 0.01
"""What an exponential schedule towards 1 leaves just before its end."""

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
        ValueError: ``start`` or ``final`` is out of range.
    """
    schedule: Schedule = lookup("schedule", name)
    if not 0 <= start <= final <= 1:
        raise ValueError(f"schedule {name!r}: need 0 <= start <= final <= 1, got start={start}, final={final}")
    t = min(max(t, 0.0), 1.0)
    if t >= 1:
        return final
    return min(max(schedule(t, start, final), start), final)
