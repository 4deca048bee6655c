"""Feeds one rule's criterion: gradients and activations of the training, or calibration data of its own.

Shape suffixes: ``_G`` groups of one rule that are still there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pruningawaretraining.criteria.base import collector_of, measures
from pruningawaretraining.criteria.second_order.gathering import gathered
from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.errors import ModelError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.registry import calling

logger = logging.getLogger(__name__)


class StatisticsFeed:
    """Gathers what one rule's criterion needs.

    Args:
        key: of the rule, for messages.
        criterion: the criterion.
        model: the model.
        grouping_on: gives the rule's groups on the model, or on a copy of it.
    """

    def __init__(
        self, key: str, criterion: Any, model: nn.Module, grouping_on: Callable[[nn.Module], Grouping]
    ) -> None:
        self.key, self.criterion, self.model = key, criterion, model
        self.collector = collector_of(criterion)
        self._grouping_on = grouping_on
        self._grouping: Grouping | None = None
        self._listening = False
        self.told_of_part = False

    @property
    def reads_gradients(self) -> bool:
        """Whether the gradients of a step are read."""
        return bool(getattr(self.collector, "reads_gradients", False))

    @property
    def grouping(self) -> Grouping:
        """The rule's groups as they are now."""
        if self._grouping is None:
            self._grouping = self._grouping_on(self.model)
        return self._grouping

    def begin(self, calibration: Calibration | None = None) -> None:
        """Listen from now on; a criterion that measures on data of its own does not need this."""
        if calibration is not None and measures(self.criterion):
            self.end()
        elif self.collector is not None and not self._listening:
            with calling("criterion", self.criterion, "a collector that listens"):
                self.collector.attach(self.model, self.grouping)
            self._listening = True

    def end(self) -> None:
        """Take every hook out."""
        if self.collector is not None and self._listening:
            self.collector.detach()
        self._listening = False

    def observe(self, scale: Tensor | float) -> None:
        """Gradients are complete and no weight has moved; ``scale`` is what they are still multiplied with."""
        if self.collector is not None and self._listening:
            with calling("criterion", self.criterion, "a collector that reads gradients"):
                self.collector.on_before_step(self.grouping, scale)

    def follow(self, keep_G: Tensor) -> None:
        """Groups have been removed, while nothing listened; ``keep_G`` says which of the rule's are left."""
        self.rebind()
        if self.collector is not None:
            self.collector.restrict(self.grouping, keep_G)

    def rebind(self) -> None:
        """The same groups lie in other tensors."""
        self._grouping = None

    def statistics(self, calibration: Calibration | None, required: bool = True) -> dict[str, Tensor]:
        """Everything there is to score with; see :attr:`~pruningawaretraining.criteria.base.Statistics.tensors`.

        Args:
            calibration: data of the criterion's own, if it was given any.
            required: whether a criterion that has seen no step is refused; else it scores by size.

        Raises:
            ModelError: no step has been seen yet.
        """
        if self.collector is None:
            return {}
        if calibration is not None and measures(self.criterion):
            with calling("criterion", self.criterion, "a dict of tensors"):
                found: dict[str, Tensor] = self.criterion.measured(self.model, self.grouping, calibration)
            return found
        self.collector.agree()
        known = self.collector.tensors()
        self._tell_of_refused()
        if _has_steps(known) or (calibration is None and not required):
            return known
        if calibration is None:
            raise ModelError(
                f"{self.key}.criterion: {type(self.criterion).__name__} listens to training, and no step has been "
                "taken yet. Allowed: a later 'start', prune() at the end of the epoch, or calibrate_with(data, loss)"
            )
        return gathered(calibration, self._grouping_on, self.criterion)[1].tensors

    def _tell_of_refused(self) -> None:
        """Warn where most steps had gradients that are not finite: losses were NaN."""
        count = getattr(self.collector, "not_finite", None)
        refused, offered = (0, 0) if count is None else count()
        if 2 * refused > offered:
            logger.warning(
                "%s.criterion: the gradients of %d of %d steps were not finite and count for nothing",
                *(self.key, refused, offered),
            )

    def ready(self, calibration: Calibration | None) -> bool:
        """Whether the criterion can score: it needs nothing, has data to look at, or has seen a step."""
        if self.collector is None or calibration is not None or _has_steps(self.collector.tensors()):
            return True
        self._tell_of_refused()
        return False

    def state_dict(self) -> dict[str, Any] | None:
        """Everything gathered so far: tensors and plain data."""
        return None if self.collector is None else self.collector.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a state.

        Raises:
            CheckpointError: it is of other groups.
        """
        if self.collector is not None and state is not None:
            self.collector.load_state_dict(state)


def _has_steps(known: dict[str, Tensor]) -> bool:
    return bool(known) and int(known.get("steps", 1)) > 0
