"""Allocation for slices, blocks and single weights, up to 10^8 of them: scores and a sparsity -> what stays.

Shape suffixes: ``_G`` groups, ``_S`` sets of groups (layers), ``_N`` any run of groups, ``_W`` shape of a weight.

Pure functions. Where :class:`pruningawaretraining.allocation.ranking.Allocator` ranks every group, these find one
threshold by selection and count ties, so that they need one copy of the scores in their own precision and masks of one
byte a group.
Counts are exact: ``floor(sparsity * groups)`` of every ranking class go, the lowest scores first, the lower index first
among equals, within the least and most that each set may lose (water-filling: what one set may not lose, others do).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pruningawaretraining.allocation.ranking import SLACK, Limits
from pruningawaretraining.groups import lowest
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.groups.reductions import count_nan
from pruningawaretraining.groups.views import slot_maxima
from pruningawaretraining.registry import lookup

NO_LIMITS = Limits()


def classes_of(grouping: Grouping, scope: str) -> Tensor:
    """The ranking class of every set (vector of sets), for a registered scope that ranks whole sets."""
    one_each = tuple(replace(one, start=number, stop=number + 1) for number, one in enumerate(grouping.sets))
    classes_S: Tensor = lookup("scope", scope)(Grouping(grouping.name, (), one_each))
    return classes_S


def allocate(
    scores_G: Tensor,
    sizes_S: Sequence[int],
    sparsity: float,
    limits: Limits = NO_LIMITS,
    classes_S: Tensor | None = None,
    removed_G: Tensor | None = None,
    exempt_G: Tensor | None = None,
) -> Tensor:
    """The groups that stay at a sparsity.

    Args:
        scores_G: importance in any floating precision, on any device; infinity means "last".
        sizes_S: groups of each set, in order.
        sparsity: fraction of the groups of each ranking class that go, in [0, 1].
        limits: bounds in every set; with ``max_sparsity`` 1 all of a set may go.
        classes_S: the ranking class of each set; None for one class.
        removed_G: groups that are masked already (True): they stay so, and count.
        exempt_G: groups that are left alone (True), and out of every count.

    Returns:
        Keep mask (bool vector of groups) on the scores' device.

    Raises:
        ValueError: scores of the wrong length, or with NaN.
    """
    values_G = _prepared(scores_G, sizes_S, removed_G, exempt_G)
    counted, gone = _counts(sizes_S, removed_G, exempt_G)
    least, most = _bounds(counted, gone, limits)
    classes = [0] * len(counted) if classes_S is None else classes_S.tolist()
    wanted = _wanted(sparsity, counted, least, most, classes)
    ranked = lowest.ranking(values_G, sizes_S, classes)
    keep_G = ranked.without_lowest(wanted)
    if limits == NO_LIMITS:  # nothing is bounded but what is gone or exempt, and these come first and last
        return keep_G
    gone = [size - kept for size, kept in zip(sizes_S, lowest.counts_of(keep_G, sizes_S), strict=True)]
    if all(low <= count <= high for low, count, high in zip(least, gone, most, strict=True)):
        return keep_G
    ranked.bound(counted, least, most)
    return ranked.without_lowest(wanted)


def _wanted(
    sparsity: float, counted: Sequence[int], least: Sequence[int], most: Sequence[int], classes: Sequence[int]
) -> dict[int, int]:
    """Number of groups to remove from each ranking class."""
    wanted = {}
    for number in sorted(set(classes)):
        mine = [index for index, one in enumerate(classes) if one == number]
        count = math.floor(sparsity * sum(counted[index] for index in mine) + SLACK)
        wanted[number] = min(max(count, sum(least[index] for index in mine)), sum(most[index] for index in mine))
    return wanted


def _prepared(scores_G: Tensor, sizes_S: Sequence[int], removed_G: Tensor | None, exempt_G: Tensor | None) -> Tensor:
    """A copy of the scores in which removed groups come first and exempt ones last, all others in between."""
    scores_G = scores_G.detach()
    if scores_G.shape != (sum(sizes_S),):
        raise ValueError(f"scores: need {sum(sizes_S)} numbers, got shape {tuple(scores_G.shape)}")
    finite = torch.finfo(scores_G.dtype)
    values_G = scores_G.clamp(finite.min, finite.max)
    if count_nan(values_G):
        raise ValueError("scores: they contain NaN; the weights or gradients are not finite")
    if removed_G is not None:
        values_G.masked_fill_(removed_G.to(values_G.device), -math.inf)
    if exempt_G is not None:
        values_G.masked_fill_(exempt_G.to(values_G.device), math.inf)
    return values_G


def _counts(sizes_S: Sequence[int], removed_G: Tensor | None, exempt_G: Tensor | None) -> tuple[list[int], list[int]]:
    """For each set, the number of groups that count, and how many of these are removed already."""
    counted = list(sizes_S)
    if exempt_G is not None:
        counted = [size - out for size, out in zip(sizes_S, lowest.counts_of(exempt_G, sizes_S), strict=True)]
    if removed_G is None:
        return counted, [0] * len(counted)
    masked_G = removed_G if exempt_G is None else removed_G & ~exempt_G.to(removed_G.device)
    return counted, lowest.counts_of(masked_G, sizes_S)


def _bounds(counted: Sequence[int], gone: Sequence[int], limits: Limits) -> tuple[list[int], list[int]]:
    """Least and greatest number of removed groups of each set."""
    floors = limits.least_of(len(counted))
    caps = [limits.max_sparsity] * len(counted) if limits.per_set is None else [one for _, one in limits.per_set]
    least = [max(math.floor(floor * n + SLACK), out) for floor, n, out in zip(floors, counted, gone, strict=True)]
    most = [n - max(0, math.ceil((1 - cap) * n - SLACK)) for cap, n in zip(caps, counted, strict=True)]
    return least, [max(pair) for pair in zip(most, least, strict=True)]


def progressive(keep_G: Tensor, next_G: Tensor, scores_G: Tensor, part: int, parts: int) -> Tensor:
    """Between two masks: of the groups that go from ``keep_G`` to ``next_G`` the ``part / parts`` with least scores.

    Args:
        keep_G: mask before the event.
        next_G: mask after it; nothing that was gone comes back.
        scores_G: importance.
        part: the sub-step, from 1 to ``parts``.
        parts: how many sub-steps an event has.
    """
    newly_G = keep_G & ~next_G
    if not lowest.on_host(keep_G):
        return keep_G & ~lowest.lowest_share(scores_G, newly_G, part, parts)
    count = int(newly_G.sum()) * part // parts
    going = torch.nonzero(newly_G).flatten()
    flags = torch.ones(len(going), dtype=torch.bool, device=going.device)
    lowest.drop_lowest([scores_G[going]], [flags], count)
    out_G = keep_G.clone()
    out_G[going[~flags]] = False
    return out_G


def zero_groups(grouping: Grouping) -> Tensor:
    """Groups whose every weight is 0 now: the mask of a checkpoint that was pruned before (True = zero)."""
    return torch.cat([slot_maxima(member, member.parameter.detach().abs()) == 0 for member in grouping.members])
