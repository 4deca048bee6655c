"""Allocation for N:M: of every M consecutive input weights the N lowest go, or none.

Shape suffixes: ``_G`` groups (single weights), ``_S`` sets of groups (layers), ``_N`` windows of all members, ``_R``
windows of one member, ``_M`` weights of a window, ``_W`` shape of a weight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from pruningawaretraining.allocation.ranking import SLACK, Limits
from pruningawaretraining.allocation.threshold import NO_LIMITS, allocate
from pruningawaretraining.errors import TargetError
from pruningawaretraining.groups import kernels as fused
from pruningawaretraining.groups import lowest
from pruningawaretraining.groups.grouping import Grouping, Member


def allocate_windows(
    scores_G: Tensor,
    grouping: Grouping,
    window: tuple[int, int],
    sparsity: float,
    dims: Sequence[int],
    limits: Limits = NO_LIMITS,
    classes_S: Tensor | None = None,
    removed_G: Tensor | None = None,
    key: str = "target",
) -> Tensor:
    """Allocate N:M: prune the N lowest weights of a window, or none.

    ``floor(sparsity / (N / M) * windows)`` windows of each ranking class are pruned, by ascending sum of those scores.

    Args:
        scores_G: importance of single weights.
        grouping: groups that are single weights, one member for each set.
        window: (N, M).
        sparsity: fraction of the weights to prune, at most N / M.
        dims: for each member, the dimension along which windows lie: its input channels.
        limits: bounds on the fraction of each set's weights.
        classes_S: the ranking class of each set; None for one class.
        removed_G: weights that are masked already (True): they stay so.
        key: the key of the config, for messages.

    Returns:
        Keep mask (bool, groups) on the scores' device.

    Raises:
        TargetError: sparsity above N / M.
    """
    most = window[0] / window[1]
    if sparsity > most + SLACK:
        raise TargetError(f"{key}: {sparsity} is out of reach of {window[0]}:{window[1]}. Allowed: at most {most:g}")
    if min(sparsity, limits.max_sparsity) >= most - SLACK:  # all windows: no ranking among them
        found = _candidates(scores_G, grouping, window, dims, removed_G)
        parts: Iterable[tuple[Tensor, Tensor | None]] = ((lowest_RM, None) for _, lowest_RM in found)
    else:
        parts = _ranked_windows(scores_G, grouping, window, sparsity, dims, limits, classes_S, removed_G)
    keep_G = torch.ones_like(scores_G, dtype=torch.bool)
    for member, dim, (candidates_RM, intact_R) in zip(grouping.members, dims, parts, strict=True):
        keep_RM = candidates_RM.logical_not_()
        _put_windows(keep_G, member, dim, keep_RM if intact_R is None else keep_RM.logical_or_(intact_R))
    return keep_G if removed_G is None else keep_G.masked_fill_(removed_G.to(keep_G.device), False)


def _ranked_windows(
    scores_G: Tensor,
    grouping: Grouping,
    window: tuple[int, int],
    sparsity: float,
    dims: Sequence[int],
    limits: Limits,
    classes_S: Tensor | None,
    removed_G: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each member its candidates, and which of its windows stay intact (with a last dimension of 1)."""
    most = window[0] / window[1]
    parts = list(_windows(scores_G, grouping, window, dims, removed_G))
    windows = [totals.numel() for _, totals, _ in parts]
    per_set = limits.per_set
    if per_set is not None:
        per_set = tuple((min(1.0, least / most), min(1.0, cap / most)) for least, cap in per_set)
    scaled = Limits(min(1.0, limits.min_sparsity / most), min(1.0, limits.max_sparsity / most), per_set=per_set)
    totals_N = torch.cat([totals.flatten() for _, totals, _ in parts])
    started_N = torch.cat([started.flatten() for _, _, started in parts])
    intact_N = allocate(totals_N, windows, min(1.0, sparsity / most), scaled, classes_S, started_N)
    for (candidates_RM, totals, _), intact in zip(parts, torch.split(intact_N, windows), strict=True):
        yield candidates_RM, intact.view(totals.shape).unsqueeze(-1)


def _put_windows(keep_G: Tensor, member: Member, dim: int, keep_RM: Tensor) -> None:
    """Write the windows of a member into the vector over all groups."""
    keep_W = keep_RM.flatten(-2)[..., : member.sizes[dim]].movedim(-1, dim)
    keep_G[member.offset : member.offset + member.n_slots].view(keep_W.shape).copy_(keep_W)


def _candidates(
    scores_G: Tensor, grouping: Grouping, window: tuple[int, int], dims: Sequence[int], removed_G: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each member its scores [..., windows, M], -inf where one is gone, and the lowest N of each window."""
    drop, of = window
    finite = torch.finfo(scores_G.dtype)
    for member, dim in zip(grouping.members, dims, strict=True):
        mine = slice(member.offset, member.offset + member.n_slots)
        values = scores_G[mine]
        if removed_G is not None:
            values = values.clamp(finite.min, finite.max).masked_fill_(removed_G[mine].to(values.device), -math.inf)
        elif not (lowest.on_host(values) and math.isfinite(float(values.sum()))):  # a copy costs as much as the rest
            values = values.clamp(finite.min, finite.max)
        in_windows = _in_windows(values, member, dim, of, -math.inf)  # padding counts as removed
        yield in_windows, _lowest_in_rows(in_windows, drop)


def _in_windows(values: Tensor, member: Member, dim: int, of: int, padding: float) -> Tensor:
    """A member's values [..., windows, M]; the last window of a row is filled up."""
    rows = values.view(member.sizes).movedim(dim, -1)
    short = -rows.shape[-1] % of
    if short:
        rows = torch.cat([rows, rows.new_full((*rows.shape[:-1], short), padding)], -1)
    return rows.reshape(*rows.shape[:-1], -1, of)


def _windows(
    scores_G: Tensor, grouping: Grouping, window: tuple[int, int], dims: Sequence[int], removed_G: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each member: the candidates [..., windows, M], the sum of their scores, and whether one is masked already."""
    finite = torch.finfo(scores_G.dtype)
    for (in_windows, candidates), member, dim in zip(
        _candidates(scores_G, grouping, window, dims, removed_G), grouping.members, dims, strict=True
    ):
        short = -member.sizes[dim] % window[1]
        gone = torch.isneginf(in_windows)
        if short:
            gone[..., -1, window[1] - short :] = False
        totals = torch.where(candidates & torch.isfinite(in_windows), in_windows, 0.0).sum(-1)
        yield candidates, totals.clamp(finite.min, finite.max), gone.any(-1)


def _lowest_in_rows(values: Tensor, count: int) -> Tensor:
    """True for the ``count`` lowest of every short row (the last dimension), the first among equals.

    Each pair of columns is compared once: sorting many rows of four costs ten times as much.
    """
    if not lowest.on_host(values):
        return lowest.lowest_in_rows(values, count)
    kernels = fused.kernels() if fused.fits(values) else None
    if kernels is not None:
        found = torch.empty(values.shape, dtype=torch.bool)
        kernels.find_lowest(values.flatten(0, -2).numpy(), count, found.flatten(0, -2).numpy())
        return found
    columns = [column.contiguous() for column in values.unbind(-1)]
    dtype = torch.uint8 if len(columns) < 256 else torch.int16
    ranks = [torch.zeros_like(column, dtype=dtype) for column in columns]
    for first, second in itertools.combinations(range(len(columns)), 2):
        before = columns[first] <= columns[second]
        ranks[second] += before
        ranks[first] += before.logical_not_()
    return torch.stack([rank < count for rank in ranks], -1)


def count_pruned(keep_G: Tensor, grouping: Grouping, window: tuple[int, int], dims: Sequence[int]) -> int:
    """How many windows have at least N masked weights; what is missing of the last one of a row counts as masked.

    Args:
        keep_G: True for weights that are kept.
        grouping, window, dims: as of :func:`allocate_windows`.
    """
    count = 0
    for member, dim in zip(grouping.members, dims, strict=True):
        mine = keep_G[member.offset : member.offset + member.n_slots]
        zeros_RM = _in_windows(~mine, member, dim, window[1], True)
        count += int((zeros_RM.sum(-1) >= window[0]).sum())
    return count
