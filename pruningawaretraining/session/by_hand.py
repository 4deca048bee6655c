"""Channels that a user chooses by hand.

Shape suffixes: ``_G`` groups that are still there, ``_O`` output channels of a layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pruningawaretraining.engine.coupled import CoupledGroups
from pruningawaretraining.engine.coupled_rules import hidden_states
from pruningawaretraining.errors import ConfigError, unknown
from pruningawaretraining.groups.grouping import Member


def keep_without(coupled: CoupledGroups, channels: Mapping[str, Sequence[int]]) -> Tensor:
    """The masks of the live groups once some channels are gone as well.

    Args:
        coupled: the model's groups.
        channels: layer -> numbers of its output channels, counted as the layer is now.

    Returns:
        keep_G.

    Raises:
        ConfigError: a layer or channel that cannot be removed; nothing has changed.
    """
    grouping = coupled.found.grouping
    members = {one.name.removesuffix(".weight"): one for one in grouping.of_role("out", "made").members}
    members |= hidden_states(grouping)
    before_G = coupled.keep_D[coupled.live_D]
    keep_G = before_G.clone()
    for layer, numbers in channels.items():
        if layer not in members:
            reason = coupled.found.skipped.get(layer)
            raise ConfigError(f"channels: {layer!r} stays: {reason}" if reason else unknown("channels", layer, members))
        groups = _groups(layer, members[layer], _integers(layer, members[layer], numbers), grouping.size)
        keep_G[groups] = False
    for one in grouping.sets:
        left = int(keep_G[one.start : one.stop].sum())
        if left < min(one.least, int(before_G[one.start : one.stop].sum())):  # less may be left of a block that is gone
            raise ConfigError(f"channels: {left} would be left of {one.name!r}. Allowed: at least {one.least} stay")
    return keep_G


def _integers(layer: str, member: Member, given: Any) -> list[int]:
    """Channel numbers as Python integers, from a sequence, an array or a tensor.

    Raises:
        ConfigError: no sequence, or something in it that is no number of a channel.
    """
    assert member.slots is not None
    last = len(member.slots) - 1
    values = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Collection):
        raise ConfigError(f"channels.{layer}: {given!r} is not allowed. Allowed: a list of numbers, 0 to {last}")
    found = []
    for value in values:
        plain = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(plain, bool) or not isinstance(plain, int) or not 0 <= plain <= last:
            raise ConfigError(f"channels.{layer}: {plain!r} is not allowed. Allowed: 0 to {last}")
        found.append(plain)
    return found


def _groups(layer: str, member: Member, numbers: Sequence[int], outside: int) -> Tensor:
    assert member.slots is not None
    slots_O = member.slots.cpu()
    wanted_O = torch.zeros(len(slots_O), dtype=torch.bool)
    wanted_O[list(numbers)] = True
    if bool((slots_O[wanted_O] >= outside).any()):
        fixed = torch.nonzero(wanted_O & (slots_O >= outside)).flatten().tolist()
        raise ConfigError(f"channels.{layer}: {fixed[0]} cannot be removed: it is coupled to something that stays")
    groups: Tensor = torch.unique(slots_O[wanted_O])  # type: ignore[no-untyped-call]
    together_O = torch.isin(slots_O, groups)
    if not torch.equal(together_O, wanted_O):
        missing = torch.nonzero(together_O & ~wanted_O).flatten().tolist()
        raise ConfigError(
            f"channels.{layer}: {sorted(numbers)} go only together with {missing}: the layers behind them tie them"
        )
    return groups
