"""Where to aim so that a measurement comes out just below a budget."""

from __future__ import annotations

TOLERANCE = 0.01
"""A latency target holds when it is measured within this fraction."""
FINE = 0.002
"""Aims that are nearer to each other are the same."""


class Aim:
    """Predictions of a latency err, by another factor for other masks: so masks are chosen for a prediction, measured,
    and chosen for another one, between the highest that came out below the budget and the lowest that came out above.

    Args:
        budget: what is to be measured, at most.

    Attributes:
        below, above: these two predictions, without a correction; None before there is one.
    """

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.below: float | None = None
        self.above: float | None = None

    def note(self, at: float, measured: float) -> bool:
        """Take a measurement of masks that were chosen for a prediction; returns whether the budget holds."""
        holds = measured <= self.budget * (1 + TOLERANCE)
        if holds:
            self.below = at if self.below is None else max(self.below, at)
        else:
            self.above = at if self.above is None else min(self.above, at)
        return holds

    @property
    def bracketed(self) -> bool:
        """Whether there is a way from one to the other."""
        return self.below is not None and self.above is not None and self.below < self.above

    def next(self, straight: float) -> float | None:
        """The prediction to choose masks for next; None if there is none between the two.

        Args:
            straight: the one that the last measurement makes of the budget, taken where there are no two to go between,
                or where what is predicted does not even say which of two masks is faster.
        """
        if self.below is None or self.above is None or not self.bracketed:
            return straight
        if self.above - self.below < FINE * self.above:
            return None
        return (self.below + self.above) / 2
