"""Epochs of loops that do not call ``prune``: counted from real steps, or the call that is missing is named."""

from __future__ import annotations

import logging

from pruningawaretraining.engine.engine import Engine
from pruningawaretraining.engine.rule import ActiveRule

logger = logging.getLogger(__name__)

MISSING = "%s: an epoch is over and prune(model, epoch) was not called; its events are in whole epochs and wait for it"
WAITS = (
    "%s: its events are in whole epochs and wait for on_epoch_begin(epoch) or prune(model, epoch), called in every "
    "epoch. Without these calls, give on_train_begin(dataloader) or steps_per_epoch, and epochs are counted"
)
COUNTED = (
    "%s: prune(model, epoch) and on_epoch_begin(epoch) are not called: epochs are counted from the optimizer's steps, "
    "%d each, from epoch %d on. Call on_epoch_begin(epoch) to have events in their epoch from the first one on"
)


class EpochCounter:
    """Counts the epochs of one training.

    Loops that call ``prune`` may do so at the end of an epoch, so nothing is counted before one is over.

    Args:
        by_itself: whether the system that the config comes from counts epochs itself, from steps or its own hooks;
            else the loop is only told what it does not call.

    Attributes:
        called: whether the loop says itself which epoch it is.
        counted: whether epochs are counted from steps.
    """

    def __init__(self, by_itself: bool) -> None:
        self.by_itself = by_itself
        self.called = self.counted = False
        self._told = False
        self._next: int | None = None  # real steps at which the next epoch begins
        self._begun = -1  # epoch of the last on_epoch_begin
        self._step = -1  # of the last on_step_begin

    def begins(self, epoch: int | None, engine: Engine) -> int:
        """An epoch begins, by the loop's word: the next one where it has no number. Returns its number."""
        now = self._begun + 1 if epoch is None else epoch
        if now > self._begun >= 0:
            self._tell_of_missing(engine, now)
        self._begun = now
        return now

    def steps_begin(self, step: int, steps: int | None, engine: Engine) -> None:
        """A step begins, by the loop's word: say what is missing where nothing else will count epochs.

        Args:
            step: of the epoch, or of the training.
            steps: of an epoch; None if not known.
            engine: with the rules.
        """
        if self.called or self._told or steps_of(engine, steps) is not None:
            return
        if step <= self._step:
            self._tell_of_missing(engine, 1)
        elif self.by_itself:
            self._tell(WAITS, in_epochs(engine))
        self._step = step

    def passed(self, counts: range, steps: int | None, engine: Engine) -> bool:
        """Whether another epoch may have begun.

        Args:
            counts: what the number of real steps may be.
            steps: of an epoch; None if not known.
            engine: with the rules.
        """
        if self.called or (self._next is not None and counts[-1] < self._next):
            return False
        known = steps_of(engine, steps)
        if known is None:
            return False
        if self._next is None:
            self._next = 0 if self.counted else counts[-1] + known
        return counts[-1] >= self._next

    def epoch(self, count: int, steps: int | None, engine: Engine) -> int | None:
        """The epoch that has begun, where its events are to take place now.

        Args:
            count: real steps.
            steps: of an epoch; None if not known.
            engine: with the rules.
        """
        known = steps_of(engine, steps)
        if known is None or self._next is None or count < self._next:
            return None
        now = count // known
        self._next = (now + 1) * known
        if not self.by_itself:
            self._tell_of_missing(engine, now)
            return None
        if not self.counted:
            self._tell(COUNTED, in_epochs(engine), known, now)
        self.counted = True
        return now

    def _tell_of_missing(self, engine: Engine, now: int) -> None:
        if not self.called and not self.by_itself:
            self._tell(MISSING, [one for one in in_epochs(engine) if one.times.first < now])

    def _tell(self, message: str, rules: list[ActiveRule], *more: int) -> None:
        """Warn once, of the first rule."""
        if rules and not self._told:
            self._told = True
            logger.warning(message, rules[0].key, *more)


def steps_of(engine: Engine, steps: int | None) -> int | None:
    """Real steps of an epoch, where rules have events in whole ones and the number is known."""
    found = [one.rule.steps_per_epoch or steps for one in in_epochs(engine)]
    return next((one for one in found if one), None)


def in_epochs(engine: Engine) -> list[ActiveRule]:
    """Rules with events to come in whole epochs."""
    return [
        one
        for one in engine.rules
        if one.works and one.times.counts == "epoch" and (one.rule.aims or one.rule.mode != "prune")
    ]
