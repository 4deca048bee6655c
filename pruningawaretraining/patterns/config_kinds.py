"""Sets of groups whose size is one number in a transformers model's config, so that they have to stay equally wide."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from pruningawaretraining.groups.grouping import Grouping, GroupSet, Member
from pruningawaretraining.models.hugging_face import configured, sizes_that_follow
from pruningawaretraining.patterns.channel_groups import ChannelGroups

Sizes = dict[str, set[tuple[str, int]]]


def with_config_kinds(model: nn.Module, found: ChannelGroups) -> ChannelGroups:
    """The groups, whose sets know which number of the model's config says their size; see :class:`GroupSet`.

    Each number that could be the size of a set is doubled in a copy of the config, and a model built from it without
    memory shows which tensors follow.

    Args:
        model: its models of transformers count; any other is without such a config.
        found: its groups.
    """
    grouping, sizes = found.grouping, Sizes()
    wanted = {value for one in grouping.sets for value in (one.size, one.size * one.width)}
    for prefix, module in configured(model):
        for key, followers in sizes_that_follow(module, wanted).items():
            sizes[f"{prefix}:{key}"] = {(f"{prefix}.{name}" if prefix else name, dim) for name, dim in followers}
    if not sizes:
        return found
    sets = tuple(replace(one, kind=_kind(grouping, one, sizes)) for one in grouping.sets)
    return replace(found, grouping=replace(grouping, sets=sets, _cache={}))


def _kind(grouping: Grouping, one: GroupSet, sizes: Sizes) -> str:
    """The number that every weight follows that the set's own layer makes; "" if none or several do."""
    mine = {
        place
        for member in grouping.members
        if member.role in ("out", "made")
        for place in _places(member, one, grouping.size)
    }
    keys = [key for key, followers in sizes.items() if mine and mine <= followers]
    return keys[0] if len(keys) == 1 else ""


def _places(member: Member, one: GroupSet, size: int) -> list[tuple[str, int]]:
    """The dimensions of a member whose entries are groups of a set."""
    dims = [dim for dim, label in enumerate(member.labels) if label is not None]
    if len(dims) != 1:
        return []
    first = int(member.slots.min()) if member.slots is not None and len(member.slots) else member.offset
    return [(member.name, dims[0])] if one.start <= first < one.stop else []
