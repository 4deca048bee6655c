"""Events of a session in a training step; see :mod:`pruningawaretraining.session.optimizer_hooks`."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from pruningawaretraining.config.origin import in_users_words
from pruningawaretraining.config.schema import PruningConfig
from pruningawaretraining.engine.books import WriteWatch
from pruningawaretraining.engine.engine import Engine
from pruningawaretraining.engine.phases import warn_of_idle, warn_of_waiting
from pruningawaretraining.masks.masks import Masks
from pruningawaretraining.masks.penalties import Regularizer
from pruningawaretraining.models.calling import in_backward, outside_inference
from pruningawaretraining.session.averages import Averages
from pruningawaretraining.session.epoch_counter import EpochCounter
from pruningawaretraining.session.optimizer_hooks import Steps

logger = logging.getLogger(__name__)


class StepEvents(ABC):
    """The moments of a real step: gradients are complete, are about to be used, and weights have moved."""

    engine: Engine
    steps: Steps
    averages: Averages
    sharded: bool
    begun: bool
    steps_per_epoch: int | None

    def __init__(self, config: PruningConfig) -> None:
        self.config, self.epochs = config, EpochCounter(config.origin.counts_epochs)
        self._penalties: list[tuple[Regularizer, Tensor]] = []
        self.told: Any = None  # what the loop has given prune to be told of events
        self.writes = WriteWatch()

    @property
    @abstractmethod
    def acts(self) -> bool:
        """Whether rules are at work."""

    @abstractmethod
    def before_round(self) -> None:
        """Find what has to be there before the first real step."""

    @abstractmethod
    def changed(self) -> None:
        """Masks or the model have changed."""

    def on_round(self) -> None:
        """A real step begins; see :mod:`pruningawaretraining.session.optimizer_hooks`."""
        self.before_round()
        if not self.sharded:
            self.writes.begins(self.engine)
        penalties = self.engine.on_round()
        self._penalties = penalties if self.acts else []

    def on_gradients(self, scale: Tensor | float, only: set[int] | None) -> None:
        """Add the regularisers to gradients that are about to be used; scores are of the loss alone, so before them."""
        if self.acts:
            lines = self.engine.on_gradients(scale)
            self.tell(lines)
            if self.tick() or lines:
                self._penalties = self.engine.gradient_penalties()
        for ready, factor_G in self._penalties:
            ready.add(factor_G * scale, only)
        if self.sharded or in_backward():  # such gradients are not accumulated where they could be masked before
            self.engine.mask_gradients(only)

    @property
    def masks(self) -> list[Masks]:
        """Every mask that acts in a step."""
        return self.engine.masks

    def on_moved(self) -> None:
        """Weights have moved, and masked ones may not be 0: shrink blocks."""
        self.engine.shrink(self.steps.fresh, self.steps.rates)

    def on_stepped(self) -> None:
        """A step is over: rules that count steps may have their last event."""
        self.averages.stepped()
        if self.acts:
            self.tick(last=True)
        if not self.sharded:
            self.writes.stepped(self.engine)

    def on_step_begin(self, step: int) -> None:
        """Rules that count steps have the event that is due; ``step`` is the loop's own number."""
        self.begun = True
        if self.acts:
            self.epochs.steps_begin(step, self.steps_per_epoch, self.engine)
            self.tick()

    def tick(self, last: bool = False) -> bool:
        """Let rules that count steps have what is due before the next step; true if something was. How many steps
        there have been is only asked where it matters, since the device may have to be waited for.

        Args:
            last: only the last event of a schedule, which no further step may follow.
        """
        with in_users_words(self.config.origin):
            lines = [] if last else self._count_epochs()
            if self.engine.asks(self.steps.counts, last):
                lines += self.engine.tick("step", self.steps.count, last)
            self.tell(lines)
            if lines and self.engine.coupled is not None and not self.sharded:  # it may run the model
                self.changed()
            return bool(lines)

    def _count_epochs(self) -> list[str]:
        """Events of an epoch that begins now, where the loop does not say so itself."""
        known = self.steps_per_epoch
        if not self.epochs.passed(self.steps.counts, known, self.engine):
            return []
        epoch = self.epochs.epoch(self.steps.count, known, self.engine)
        return [] if epoch is None else self.engine.prune(epoch)

    def take_waiting(self) -> bool:
        """A training ends: events that wait for gradients of masked weights take place without them.

        Returns:
            Whether there were some, or masks are still to come into force.
        """
        pending = any(one.pending for one in self.engine.rules)
        with outside_inference(), in_users_words(self.config.origin):
            lines = self.engine.fire_waiting(hears=False) if self.acts else []
        self.tell(lines)
        warn_of_waiting(self.engine.rules)
        warn_of_idle(self.engine.rules)
        return pending or bool(lines)

    def tell(self, lines: list[str]) -> None:
        """Log what has happened, and hand it to the logger or function that the loop has given."""
        for line in lines:
            tell_once(logger, self.told, line)
        if lines:
            self.begun = True


def tell_once(own: logging.Logger, target: Any, line: str) -> None:
    """Log a line, and hand it to a logger or a function; where both loggers write to the same place, once.

    Args:
        own: the library's logger.
        target: a logger, its ``info``, another function of one line, or None.
        line: what has happened.
    """
    other = target if isinstance(target, logging.Logger) else getattr(target, "__self__", None)
    if not isinstance(other, logging.Logger):
        own.info(line)
        if target is not None:
            target(line)
        return
    mine, others = _reached(own), _reached(other)
    if not mine <= others:
        own.info(line)
    if not mine or mine <= others or not others <= mine:
        other.info(line)


def _reached(one: logging.Logger) -> set[int]:
    """The handlers that write an INFO line of a logger."""
    here: logging.Logger | None = one if one.isEnabledFor(logging.INFO) else None
    found: set[int] = set()
    while here is not None:
        found |= {id(handler) for handler in here.handlers}
        here = here.parent if here.propagate else None
    return found
