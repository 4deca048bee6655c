"""Check the epoch given to ``prune``: refuse one that is missing but needed, and warn of one that comes late."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pruningawaretraining.engine.rule import ActiveRule
from pruningawaretraining.errors import ConfigError

logger = logging.getLogger(__name__)


def check_missing(rules: Sequence[ActiveRule]) -> None:
    """Refuse a call of ``prune`` without an epoch where rules have events in several.

    Raises:
        ConfigError: it names the rule and its epochs.
    """
    for one in _scheduled(rules):
        raise ConfigError(
            f"epoch is required: {one.key} prunes in epochs {one.times.first} to {one.times.last}. "
            "Allowed: pruner.prune(model, epoch), counted from 0"
        )


def warn_of_late(rules: Sequence[ActiveRule], epoch: int) -> None:
    """Warn of rules whose first event comes after their schedule has ended: it prunes everything at once."""
    for one in _scheduled(rules):
        if one.state.event == 0 and epoch > one.times.last:
            logger.warning(
                "%s: epoch %d is the first to be handed to prune, after the schedule's last (%d): everything is pruned "
                "at once. Call prune after every epoch, counted from 0; to prune right now, leave out start and end",
                *(one.key, epoch, one.times.last),
            )


def _scheduled(rules: Sequence[ActiveRule]) -> list[ActiveRule]:
    """Rules at work that have events in more epochs than one."""
    return [one for one in rules if one.gathers and one.times.counts == "epoch" and one.times.last > one.times.first]
