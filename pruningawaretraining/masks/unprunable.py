"""Warn once which share of a model's MACs is in layers that cannot lose channels, and why."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
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
MOST_NAMED, MOST_LIKE = 8, 3
"""Layers that are named with one reason; of more than so many, those of like names are one."""
_NUMBER = re.compile(r"(?<=[._])\d+(?=[. ])")
"""Of a block, inside a layer's name."""


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
    raw = {name for name, _ in model.named_parameters()}
    stay = {
        name: reason
        for name, reason in found.skipped.items()
        if (name in chosen or name in raw)
        and name not in pruned
        and OUTPUT not in reason
        and "not selected" not in reason
    }
    if not stay:
        return
    whole = _outermost([name for name in stay if not any(_is_in(one, name) for one in pruned)])
    counts = macs_per_layer(model, inputs, forward_fn)
    counts |= _of_raw([name for name in whole if name in raw], counts)
    share = sum(counts.get(name, 0) for name in whole) / max(counts[""], 1)
    if share < LEAST:
        return
    order = sorted(whole, key=lambda name: -counts.get(name, 0))
    reasons = by_reason({name: stay[name] for name in order})
    shown = "; ".join(f"{names}: {reason}" for reason, names in reasons[:SHOWN])
    more = "; and others (pat inspect shows all)" if len(reasons) > SHOWN else ""
    logger.warning("layers with %.0f%% of the MACs keep all their channels. %s%s", 100 * share, shown, more)


def _of_raw(names: Collection[str], counts: Mapping[str, int]) -> dict[str, int]:
    """MACs in the code of the modules that own raw parameters, with one parameter of each."""
    found: dict[str, int] = {}
    for owner, name in {one.rpartition(".")[0]: one for one in names}.items():
        prefix = f"{owner}." if owner else ""
        inside = [one for one in counts if one and one != owner and one.startswith(prefix)]
        direct = [one for one in inside if "." not in one.removeprefix(prefix)]
        found[name] = max(0, counts.get(owner, 0) - sum(counts[one] for one in direct))
    return found


def _is_in(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")


def _outermost(names: Collection[str]) -> list[str]:
    """Those that are in none of the others: the MACs of a module are with those of its children."""
    return [one for one in names if not any(other != one and _is_in(one, other) for other in names)]


def by_reason(skipped: Mapping[str, str]) -> list[tuple[str, str]]:
    """Each reason once, with the layers that it is given for; blocks that differ in their number alone are ``*``.

    Args:
        skipped: layer -> why it stays.
    """
    found: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        found.setdefault(_NUMBER.sub("*", reason), []).append(name)
    return [(_common({skipped[name] for name in names}, like), _named(names)) for like, names in found.items()]


def _common(reasons: set[str], like: str) -> str:
    """The reason itself if there is one alone, else what is common to them."""
    return reasons.pop() if len(reasons) == 1 else like


def _named(names: Sequence[str]) -> str:
    """Names in a line; of many, blocks of like names as one: ``blocks.*.attn.qkv (12 layers)``."""
    if len(names) > MOST_LIKE:
        like = Counter(_NUMBER.sub("*", name) for name in names)
        one_of = {_NUMBER.sub("*", name): name for name in names}
        names = [one_of[key] if count == 1 else f"{key} ({count} layers)" for key, count in like.items()]
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
