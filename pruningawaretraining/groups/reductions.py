"""Reductions: the values of a group's weights -> one value for the group.

Shape suffixes: ``_G`` groups, ``_S`` slots of one member, ``_W`` any weight.

Each is a function ``(grouping, values, dtype) -> vector of groups``, where ``values`` gives a tensor shaped like a
member's, or None where nothing is known of it. Values of one member at a time are held. Of weights that lie on several
processes, values are those of this one's part (or DTensors), and one all-reduce of one number a group follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pruningawaretraining.distributed.fsdp import across, is_sharded, local_member, local_of
from pruningawaretraining.groups.grouping import Grouping, Member, add_slots
from pruningawaretraining.groups.placed import placed
from pruningawaretraining.groups.views import slot_counts, slot_maxima, slot_sums
from pruningawaretraining.registry import register

Values = Callable[[Member], "Tensor | None"]
Reduction = Callable[[Grouping, Values, torch.dtype], Tensor]


def device_of(grouping: Grouping) -> torch.device:
    """Device of the grouping's first tensor, on which vectors over groups are kept."""
    return grouping.members[0].parameter.device if grouping.members else torch.device("cpu")


def is_of_single_weights(grouping: Grouping) -> bool:
    """Whether every entry of the members is a group of its own, in their order, and all of them lie on one device."""
    end = 0
    for one in grouping.members:
        if one.slots is not None or one.offset != end or one.sizes != one.parameter.shape or not all(one.identity):
            return False
        end += one.n_slots
    weights = [one.parameter for one in grouping.members]
    return end == grouping.size and len({one.device for one in weights}) == 1 and not any(map(is_sharded, weights))


def count_nan(values_G: Tensor) -> int:
    """How many values are NaN; waits for the device. They are looked at one by one only where their sum is NaN."""
    return int(torch.isnan(values_G).count_nonzero()) if math.isnan(float(values_G.sum())) else 0


@register("reduction", "sum")
def reduce_sum(grouping: Grouping, values: Values, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sum over a group's weights."""
    whole_G1 = total_G1 = torch.zeros(grouping.size + 1, dtype=dtype, device=device_of(grouping))
    weights = [member.parameter for member in grouping.members if is_sharded(member.parameter)]
    part_G1 = torch.zeros_like(whole_G1) if weights else whole_G1
    for member in grouping.members:
        values_W = values(member)
        if values_W is not None:
            sharded = is_sharded(member.parameter)
            sums_S = slot_sums(local_member(member), local_of(values_W)).to(total_G1)
            total_G1 = part_G1 if sharded else whole_G1
            add_slots(total_G1, member, sums_S)
    if weights:
        whole_G1 += across(part_G1, weights)
    return whole_G1[:-1]


@register("reduction", "mean")
def reduce_mean(grouping: Grouping, values: Values, dtype: torch.dtype = torch.float32) -> Tensor:
    """The mean over a group's weights (those of a padded block that are there)."""
    sums_G = reduce_sum(grouping, values, dtype)
    if all(member.slots is None for member in grouping.members):
        for member in grouping.members:
            sums_S = sums_G[member.offset : member.offset + member.n_slots]
            sums_S.view(member.sizes).div_(placed(slot_counts(member), sums_S.device, sums_S.dtype))
        return sums_G
    return sums_G / placed(_group_counts(grouping), sums_G.device, sums_G.dtype)


def _group_counts(grouping: Grouping) -> Tensor:
    """Number of entries of each group, at least 1, float32 on the CPU; counted once."""
    if "entries" not in grouping._cache:
        count_G1 = torch.zeros(grouping.size + 1, dtype=torch.float32, device="cpu")
        for member in grouping.members:
            count_S = slot_counts(member).expand(member.sizes).reshape(-1)
            own = torch.arange(member.offset, member.offset + member.n_slots, device="cpu")
            count_G1.index_add_(0, own if member.slots is None else member.slots.cpu(), count_S)
        grouping._cache["entries"] = count_G1[:-1].clamp(min=1)
    return grouping._cache["entries"]


@register("reduction", "max")
def reduce_max(grouping: Grouping, values: Values, dtype: torch.dtype = torch.float32) -> Tensor:
    """The largest over a group's weights; 0 for a group of which nothing is known."""
    largest_G1 = torch.full((grouping.size + 1,), -math.inf, dtype=dtype, device=device_of(grouping))
    for member in grouping.members:
        values_W = values(member)
        if values_W is not None:
            largest_S = slot_maxima(local_member(member), local_of(values_W)).to(largest_G1)
            if member.slots is None:
                mine = largest_G1[member.offset : member.offset + member.n_slots]
                torch.maximum(mine, largest_S, out=mine)
            else:
                largest_G1.scatter_reduce_(0, placed(member.slots, largest_G1.device), largest_S, "amax")
    largest_G1 = across(largest_G1, (member.parameter for member in grouping.members), largest=True)
    return largest_G1[:-1].masked_fill_(torch.isneginf(largest_G1[:-1]), 0.0)


def members_per_set(grouping: Grouping) -> Tensor:
    """How many members index groups of each set (vector of sets)."""
    count_S = torch.zeros(len(grouping.sets), dtype=torch.int64)
    for member in grouping.members:
        if member.slots is None:
            first, last = member.offset, member.offset + member.n_slots
            count_S += torch.tensor([one.start < last and first < one.stop for one in grouping.sets])
            continue
        groups = member.slots.cpu()
        count_S[torch.unique(grouping.set_ids[groups[groups < grouping.size]])] += 1
    return count_S
