"""When criteria follow the training: while their rules need it, and never during anything else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pruningawaretraining.criteria.second_order import Calibration
from pruningawaretraining.engine.rule import ActiveRule


class Observing(ABC):
    """Lets the criteria of rules follow the training."""

    def __init__(self) -> None:
        self.calibration: Calibration | None = None  # data that criteria and compensation may look at
        self._listens = False

    @property
    @abstractmethod
    def rules(self) -> Sequence[ActiveRule]:
        """The rules."""

    def listen(self) -> None:
        """Let criteria that need it follow the training, as long as their rules have events to come."""
        self._listens = True
        self.follow_phases()

    def follow_phases(self) -> None:
        """Let each criterion follow the training while its rule needs it."""
        for one in self.rules if self._listens else ():
            if one.gathers:
                one.feed.begin(self.calibration)
            else:
                one.feed.end()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is observed inside the block: what runs there is not training."""
        self.release()
        try:
            yield
        finally:
            self.follow_phases()

    def release(self) -> None:
        """Take the hooks of every criterion out; masks stay."""
        for one in self.rules:
            one.feed.end()
