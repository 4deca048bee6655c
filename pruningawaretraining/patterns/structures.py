"""Residual blocks beside the channels, heads and experts in them: one grouping of all, a set for each block.

Shape suffixes: ``_G`` groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pruningawaretraining.groups.grouping import Grouping, GroupSet, Member
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.patterns.expert import is_of_experts

SIGNATURE = "block beside channels"


def is_block(one: GroupSet) -> bool:
    """Whether a set is a residual block beside channels: it may lose its only group."""
    return one.signature == SIGNATURE


def together(channels: ChannelGroups, blocks: ChannelGroups) -> ChannelGroups:
    """Channels, heads and experts followed by residual blocks.

    Args:
        channels: of a model, heads and experts included.
        blocks: of the same model, all in one set.
    """
    (one,) = blocks.grouping.sets
    sets = tuple(GroupSet(name, n, n + 1, 1, SIGNATURE, (name,)) for n, name in enumerate(one.layers))
    members = tuple(replace(member, role="block") for member in blocks.grouping.members)
    both = _named_apart(channels, one.layers).beside(replace(blocks, grouping=Grouping("depth", members, sets)))
    first = len(channels.attachments)  # blocks are taken out first: what counts experts looks at those that are left
    return replace(both, attachments=(*both.attachments[first:], *both.attachments[:first]))


def _named_apart(found: ChannelGroups, blocks: Sequence[str]) -> ChannelGroups:
    """The groups; experts of a block that is a residual block itself are called by the module with their weights."""
    sets = tuple(
        replace(one, name=one.layers[-1]) if one.name in blocks and is_of_experts(one) else one
        for one in found.grouping.sets
    )
    return replace(found, grouping=replace(found.grouping, sets=sets, _cache={}))


def blocks_of_sets(found: ChannelGroups) -> dict[int, int]:
    """Number of each set whose groups lie in one residual block alone -> number of that block's set."""
    grouping, numbers = found.grouping, {one.name: n for n, one in enumerate(found.grouping.sets) if is_block(one)}
    if not numbers:
        return {}
    places: dict[int, set[str]] = {}
    for member in grouping.members:
        if member.role != "block":
            inside = next((name for name in numbers if member.name.startswith(f"{name}.")), "")
            for number in _sets_of(member, grouping):
                places.setdefault(number, set()).add(inside)
    return {
        number: numbers[next(iter(names))] for number, names in places.items() if len(names) == 1 and "" not in names
    }


def modules_of_blocks(found: ChannelGroups) -> dict[int, set[str]]:
    """Number of each set that is a block -> the modules that leave the model with it."""
    size, modules = found.grouping.size, dict[int, set[str]]()
    for number, one in enumerate(found.grouping.sets):
        if is_block(one):
            modules[number] = found.taken_out(torch.arange(size) != one.start)
    return modules


def _sets_of(member: Member, grouping: Grouping) -> list[int]:
    assert member.slots is not None
    slots = member.slots.cpu()
    found: list[int] = torch.unique(grouping.set_ids[slots[slots < grouping.size]]).tolist()
    return found


def without_contents(keep_G: Tensor, grouping: Grouping, inside: dict[int, int]) -> Tensor:
    """The masks with all groups dropped that lie in blocks which are dropped."""
    keep_G = keep_G.clone()
    for number, block in inside.items():
        if not bool(keep_G[grouping.sets[block].start]):
            one = grouping.sets[number]
            keep_G[one.start : one.stop] = False
    return keep_G
