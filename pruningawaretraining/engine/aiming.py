"""Where to aim so that a measurement comes out just below a budget.

Shape suffixes: ``_R`` groups of one rule.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pruningawaretraining.allocation.goals import UNUSED, Goal
from pruningawaretraining.costs.latency.model import LatencyCost
from pruningawaretraining.engine.latency_target import LatencyReached, say_missed, say_undercut
from pruningawaretraining.errors import TargetError

TOLERANCE = 0.01
"""A latency target holds when it is measured within this fraction."""
FINE = 0.002
"""Aims that are nearer to each other are the same."""


class Aim:
    """Predicts where to look next. A predicted latency is off by a factor that differs from mask to mask. So masks are
    chosen for a prediction and measured; the next prediction lies between the one that came out nearest below the
    budget and the next higher one that came out above it.

    Args:
        budget: what is to be measured, at most.
        at: the prediction that the first masks were chosen for.

    Attributes:
        at: the prediction to choose masks for next, without a correction; None if there is none left to try.
        best: what was measured nearest below the budget; None before there is one.
    """

    def __init__(self, budget: float, at: float) -> None:
        self.budget = budget
        self.at: float | None = at
        self.best: tuple[Tensor, LatencyReached] | None = None
        self._below: tuple[float, float] | None = None
        self._above: list[tuple[float, float]] = []

    def note(self, keep_R: Tensor, reached: LatencyReached) -> None:
        """Take the measurement of masks that were chosen for ``at``, and aim anew."""
        assert self.at is not None
        if reached.measured_ms > self.budget * (1 + TOLERANCE):
            self._above.append((self.at, reached.measured_ms))
        elif self.best is None or reached.measured_ms >= self.best[1].measured_ms:
            self.best, self._below = (keep_R, reached), (self.at, reached.measured_ms)
        if self._below is None:
            at, measured = min(self._above)
            self.at = at * self.budget / measured
            return
        at, measured = self._below
        higher = [one for one, _ in self._above if one > at]
        if not higher:
            self.at = max(at * self.budget / measured, at * (1 + FINE))
        else:
            self.at = None if min(higher) < at * (1 + FINE) else (at + min(higher)) / 2

    @property
    def is_used(self) -> bool:
        """Whether what was measured uses the budget."""
        return self.best is not None and self.best[1].measured_ms >= self.budget * (1 - UNUSED)


def aimed(
    cost: LatencyCost,
    timed: Goal,
    keep_R: Tensor,
    measure: Callable[[Tensor], LatencyReached],
    choose: Callable[[float, Tensor], Tensor],
    rounds: int,
) -> tuple[Tensor, LatencyReached]:
    """Measure masks and choose others, until the budget holds and is used; returns masks and their measurement.

    Of the masks that hold, those that use most of it are taken; where none does, the last, and that is said.

    Args:
        cost: predicts, and is corrected by every measurement.
        timed: the goal.
        keep_R: the masks to begin with.
        measure: says what masks take.
        choose: (a budget for the prediction, masks like it) -> masks.
        rounds: of measuring at most.
    """
    aim, missed = Aim(timed.budget, timed.budget / cost.correction), ""
    known: dict[bytes, LatencyReached] = {}
    for left in reversed(range(rounds)):
        same = keep_R.numpy().tobytes()
        reached = known[same] = known.get(same) or measure(keep_R)
        if reached.is_noisy:
            return keep_R, reached
        aim.note(keep_R, reached)
        if aim.is_used or aim.at is None or not left:
            break
        try:
            keep_R = choose(aim.at * cost.correction, keep_R)
        except TargetError as error:  # training goes on with what is there: a measurement decides no run
            missed = f": {error}"
            break
    if aim.best is not None:
        say_undercut(timed.key, aim.best[1])
        return aim.best
    say_missed(timed.key, reached, missed)
    return keep_R, reached
