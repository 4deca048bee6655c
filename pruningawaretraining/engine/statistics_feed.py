"""What the criteria of channel rules hear of training: gradients, activations, or calibration data of their own.

Shape suffixes: ``_G`` groups of one rule that are still there.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor, nn

from pruningawaretraining.criteria.base import collector_of
from pruningawaretraining.criteria.second_order.channels import readers
from pruningawaretraining.criteria.second_order.criteria import Sampling
from pruningawaretraining.criteria.second_order.gathering import gathered
from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.errors import ModelError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.patterns.channel_groups import ChannelGroups


def measures(criterion: Any) -> bool:
    """Whether a criterion measures what it needs itself, on data that the pruner is given."""
    return hasattr(criterion, "measured")


class StatisticsFeed:
    """Gathers what one rule's criterion needs.

    Args:
        key: of the rule, for messages.
        criterion: the criterion.
        model: the model.
        found: its channels that are still there.
        sets: numbers of the rule's sets.
    """

    def __init__(self, key: str, criterion: Any, model: nn.Module, found: ChannelGroups, sets: list[int]) -> None:
        self.key, self.criterion, self.model = key, criterion, model
        self.found, self.sets = found, sets
        self.collector = collector_of(criterion)
        self._listening = False

    @cached_property
    def grouping(self) -> Grouping:
        """The rule's groups; gates are where channels are read, so only there for criteria of second order."""
        own = self.found.grouping.select_sets(self.sets)
        return readers(own) if isinstance(self.criterion, Sampling) else own

    def begin(self, calibration: Calibration | None = None) -> None:
        """Listen from now on; a criterion that measures on data of its own has no need to."""
        if calibration is not None and measures(self.criterion):
            self.end()
        elif self.collector is not None and not self._listening:
            self.collector.attach(self.model, self.grouping)
            self._listening = True

    def end(self) -> None:
        """Take every hook out."""
        if self.collector is not None and self._listening:
            self.collector.detach()
        self._listening = False

    def hear(self, scale: Tensor | float) -> None:
        """Gradients are complete and no weight has moved."""
        if self.collector is not None and self._listening:
            self.collector.on_before_step(self.grouping, scale)

    def follow(self, found: ChannelGroups, keep_G: Tensor) -> None:
        """Channels have been removed, while nothing listened.

        Args:
            found: those that are left.
            keep_G: which of the rule's groups are among them.
        """
        self.found = found
        self.__dict__.pop("grouping", None)
        if self.collector is not None:
            self.collector.restrict(self.grouping, keep_G)

    def rebind(self, found: ChannelGroups) -> None:
        """The same channels of other tensors."""
        self.found = found
        self.__dict__.pop("grouping", None)

    def statistics(self, calibration: Calibration | None) -> dict[str, Tensor]:
        """What there is to score with; see :attr:`~pruningawaretraining.criteria.base.Statistics.tensors`.

        Args:
            calibration: data of the criterion's own, if it was given any.

        Raises:
            ModelError: there has been nothing to hear yet.
        """
        if self.collector is None:
            return {}
        if calibration is not None and measures(self.criterion):
            found: dict[str, Tensor] = self.criterion.measured(self.model, self.grouping, calibration)
            return found
        self.collector.agree()
        known = self.collector.tensors()
        if known and int(known.get("steps", 1)) > 0:
            return known
        if calibration is None:
            raise ModelError(
                f"{self.key}.criterion: {type(self.criterion).__name__} listens to training, and no step has been "
                "taken yet. Allowed: a later 'start', prune() at the end of the epoch, or calibrate_with(data, loss)"
            )
        return gathered(calibration, self._grouping_on, self.criterion)[1].tensors

    def _grouping_on(self, model: nn.Module) -> Grouping:
        """The rule's groups on a copy of the model."""
        return self.found.on(model).grouping.select_sets(self.sets)

    def ready(self, calibration: Calibration | None) -> bool:
        """Whether the criterion can score: it needs nothing, has data to look at, or has heard a step."""
        if self.collector is None or (calibration is not None and measures(self.criterion)):
            return True
        known = self.collector.tensors()
        return bool(known) and int(known.get("steps", 1)) > 0

    def state_dict(self) -> dict[str, Any] | None:
        """What has been heard: tensors and plain data."""
        return None if self.collector is None else self.collector.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a state.

        Raises:
            CheckpointError: it is of other groups.
        """
        if self.collector is not None and state is not None:
            self.collector.load_state_dict(state)
