"""Warn once which share of a model's MACs is in layers that cannot lose channels, and why."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from torch import nn

from pruningawaretraining.costs.macs import macs_per_layer
from pruningawaretraining.models.calling import ForwardFn
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.patterns.labels.trace import OUTPUT

logger = logging.getLogger(__name__)
LEAST = 0.05
"""A smaller share of the MACs is not worth a warning."""
SHOWN = 3


def warn_of_rest(
    model: nn.Module, found: ChannelGroups, inputs: Any, forward_fn: ForwardFn | None, chosen: Collection[str]
) -> None:
    """Warn of layers that were chosen and keep all their channels, those with the most MACs first.

    Args:
        model: the model.
        found: its groups; ``skipped`` has the reasons.
        inputs, forward_fn: how to run it.
        chosen: the layers that may lose channels; those that make the outputs are not spoken of.
    """
    pruned = {one.name.removesuffix(".weight") for one in found.grouping.of_role("out").members}
    pruned |= {one.name for one in found.grouping.sets}
    stay = {
        name: reason
        for name, reason in found.skipped.items()
        if name in chosen and name not in pruned and OUTPUT not in reason and "not selected" not in reason
    }
    if not stay:
        return
    whole = _outermost({name for name in stay if not any(_is_in(one, name) for one in pruned)})
    counts = macs_per_layer(model, inputs, forward_fn)
    share = sum(counts.get(name, 0) for name in whole) / max(counts[""], 1)
    if share < LEAST:
        return
    order = sorted(whole, key=lambda name: -counts.get(name, 0))
    shown = "; ".join(f"{name}: {stay[name]}" for name in order[:SHOWN])
    more = f"; and {len(order) - SHOWN} more (pat inspect shows all)" if len(order) > SHOWN else ""
    logger.warning("layers with %.0f%% of the MACs keep all their channels. %s%s", 100 * share, shown, more)


def _is_in(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")


def _outermost(names: Collection[str]) -> list[str]:
    """Those that are in none of the others: the MACs of a module are with those of its children."""
    return [one for one in names if not any(other != one and _is_in(one, other) for other in names)]
