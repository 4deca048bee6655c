"""Plans for maps of single elements: soft thresholding, and N of M.

Shape suffixes: ``_W`` any weight, ``_K`` elements of one group (last dimension), ``_KK`` pairs of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

from pruningawaretraining.distributed.fsdp import Shards, check_whole_groups, local_labels, local_of
from pruningawaretraining.groups.grouping import Member
from pruningawaretraining.proximal.groupers import ElemGrouper, Grouper, GroupView
from pruningawaretraining.proximal.low_rank import thresholds
from pruningawaretraining.proximal.maps import ElementMap, NMSparseConstraint, Scale
from pruningawaretraining.proximal.pools import ALONE, PASSING, Job, Pool, pooled
from pruningawaretraining.proximal.weight_pairs import HALF, WeightPair, accumulation_dtype

PAIRWISE = 8
"""Groups of up to so many elements are ranked by comparing all pairs, larger ones by sorting."""


class LassoPlan:
    """Soft thresholding of elements.

    Args:
        grouper: whose groups the slope counts.
        parts: the weights.
        slope: see :class:`GroupOptions`.
        pool: whether small weights are worked on together.
    """

    def __init__(self, grouper: Grouper, parts: Sequence[WeightPair], slope: float, pool: bool) -> None:
        whole, found = ElemGrouper(), []
        for index, part in enumerate(parts):
            weights = local_of(part.source), local_of(part.target)
            blocks = list(zip(whole.blocks(weights[0]), whole.blocks(weights[1]), strict=True))
            found.append(Job.of(index, weights, blocks))
        self.pools = pooled(found, ALONE, PASSING, several=True) if pool and not slope else []
        inside = {index for one in self.pools for index in one.indices}
        self.jobs: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for job, part in zip(found, parts, strict=True):
            if job.index not in inside:
                self.jobs.append((job.source, job.target, _slope_of(grouper, part, slope) if slope else None))

    def run(self, scale: Scale, fraction: float) -> None:
        """Take one proximal step."""
        for pool in self.pools:
            pool.load()
            shrink(pool.buffer_N, pool.buffer_N, None, scale)
            pool.store()
        for source, target, slope_W in self.jobs:
            shrink(source, target, slope_W, scale)


def shrink(source_W: Tensor, target_W: Tensor, slope_W: Tensor | None, scale: Scale) -> None:
    """Soft thresholding of a tensor by ``scale``, times ``slope_W`` if there is one."""
    if slope_W is None and isinstance(scale, (int, float)) and source_W.dtype not in HALF:
        torch.ops.aten.softshrink.out(source_W, float(scale), out=target_W)
        return
    limit = (slope_W if slope_W is not None else torch.ones((), device=source_W.device)) * scale
    wide = source_W.to(accumulation_dtype(source_W.dtype))
    target_W.copy_(wide - wide.clamp(-limit, limit))


def _slope_of(grouper: Grouper, part: WeightPair, slope: float) -> Tensor:
    """The multiplier of each element's threshold, broadcastable to the (local) weight."""
    source = local_of(part.source)
    wide = source.new_empty(0, dtype=accumulation_dtype(source.dtype))
    values = thresholds(slope, grouper.n_groups(part.source.shape), wide)
    labels, sizes = local_labels(part.source, *grouper.labels(part.source.shape))
    return Member(part.name, source, labels, sizes).spread(values, 1.0)


class RankedPlan:
    """The largest elements of every group stay (N:M sparsity).

    Args:
        prox: the map.
        grouper: the groups.
        parts: the weights.
        pool: whether small weights are worked on together, and groups are ranked by few operations.
    """

    def __init__(self, prox: NMSparseConstraint, grouper: Grouper, parts: Sequence[WeightPair], pool: bool) -> None:
        self.kept = prox.n_nonzero
        self.pools: list[Pool] = []
        found, pairs = [], []
        for index, part in enumerate(parts):
            if Shards.of(part.source) is not None:
                check_whole_groups(part.source, *grouper.labels(part.source.shape), part.name)
            weights = local_of(part.source), local_of(part.target)
            pairs.append(list(zip(grouper.blocks(weights[0]), grouper.blocks(weights[1]), strict=True)))
            found.append(Job.of(index, weights, pairs[-1], members_in_order=True))
        if pool:
            self.pools = pooled(found, PASSING, PASSING, several=True)
        inside = {index for one in self.pools for index in one.indices}
        self.jobs = [pair for index, own in enumerate(pairs) if index not in inside for pair in own]
        every = [block for one in self.pools for block in one.blocks] + [source for source, _ in self.jobs]
        able = [block for block in every if pool and len(block.dims) == 1 and _window(block)[1] <= PAIRWISE]
        self.earlier_KK = {_window(block): _earlier(block) for block in able}

    def run(self, scale: Scale, fraction: float) -> None:
        """Take one proximal step."""
        for pool in self.pools:
            pool.load()
            for block in pool.blocks:
                keep_largest(block, block, self.kept, self.earlier_KK.get(_window(block)))
            pool.store()
        for source, target in self.jobs:
            keep_largest(source, target, self.kept, self.earlier_KK.get(_window(source)))


def _window(block: GroupView) -> tuple[torch.device, int]:
    """Where a block is, and how many elements a group of it has."""
    return block.view.device, math.prod(block.view.shape[dim] for dim in block.dims)


def _earlier(block: GroupView) -> Tensor:
    """For each element of a group, True for those before it."""
    device, size = _window(block)
    return torch.ones(size, size, dtype=torch.bool, device=device).tril_(-1)


def keep_largest(source: GroupView, target: GroupView, kept: int, earlier_KK: Tensor | None = None) -> None:
    """Copy a block with all but the ``kept`` elements of largest magnitude of each group set to 0.

    Args:
        source, target: the block, and where it goes; the same for in place.
        kept: how many stay.
        earlier_KK: which elements of a group go before which; given where few operations count more than few passes.
    """
    _, size = _window(source)
    if kept >= size:
        if source is not target:
            target.view.copy_(source.view)
    elif kept == 0:
        target.view.zero_()
    elif len(source.dims) == 1 and size <= PAIRWISE:
        dim = source.dims[0]
        if earlier_KK is None:
            keep = torch.stack(ranked([element.abs() for element in source.view.unbind(dim)], kept), dim)
        else:
            keep = among_largest(source.view.abs(), dim, kept, earlier_KK)
        torch.mul(source.view, keep, out=target.view)
    else:
        last = tuple(range(-len(source.dims), 0))
        moved = source.view.movedim(source.dims, last)
        flat_K = moved.flatten(-len(source.dims)) if source.dims else moved.unsqueeze(-1)
        order = flat_K.abs().sort(dim=-1, descending=True, stable=True).indices
        result = flat_K.scatter(-1, order[..., kept:], 0.0)
        target.view.movedim(target.dims, last).copy_(result.view(moved.shape))


def among_largest(magnitudes: Tensor, dim: int, kept: int, earlier_KK: Tensor) -> Tensor:
    """Where an entry is among the ``kept`` largest along a dimension; the first of equals goes before. All pairs are
    compared at once: few operations, with two bytes an entry for each element of a group."""
    this, other = magnitudes.unsqueeze(dim + 1), magnitudes.unsqueeze(dim)
    tail = (1,) * (magnitudes.dim() - dim - 1)
    ties = (other == this).logical_and_(earlier_KK.view(*earlier_KK.shape, *tail))
    return (other > this).logical_or_(ties).sum(dim + 1, dtype=torch.uint8) < kept


def ranked(magnitudes: Sequence[Tensor], kept: int) -> list[Tensor]:
    """For each of a few tensors, where it is among the ``kept`` largest; the first of equals goes before."""
    size = len(magnitudes)
    first_wins = {(i, j): magnitudes[i] >= magnitudes[j] for i in range(size) for j in range(i + 1, size)}
    beaten = {pair: ~won for pair, won in first_wins.items()}
    if (size, kept) == (4, 2):
        return [_at_most_one(*_losses(i, size, first_wins, beaten)) for i in range(size)]
    return [
        reduce(add, (lost.to(torch.uint8) for lost in _losses(i, size, first_wins, beaten))) < kept for i in range(size)
    ]


def _losses(
    i: int, size: int, first_wins: dict[tuple[int, int], Tensor], beaten: dict[tuple[int, int], Tensor]
) -> list[Tensor]:
    return [first_wins[j, i] if j < i else beaten[i, j] for j in range(size) if j != i]


def _at_most_one(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Where at most one of three is True."""
    return ((a & b) | (c & (a | b))).logical_not_()


def element_plan(
    prox: ElementMap, grouper: Grouper, parts: Sequence[WeightPair], slope: float, pool: bool
) -> LassoPlan | RankedPlan:
    """A plan for a map of single elements."""
    if isinstance(prox, NMSparseConstraint):
        return RankedPlan(prox, grouper, parts, pool)
    return LassoPlan(grouper, parts, slope, pool)
