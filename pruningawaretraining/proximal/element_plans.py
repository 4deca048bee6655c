"""Plans for maps of single elements: soft thresholding, and N of M.

Shape suffixes: ``_W`` any weight, ``_K`` elements of one group (last dimension).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

from pruningawaretraining.grouping import Member
from pruningawaretraining.proximal.groupers import Block, Grouper
from pruningawaretraining.proximal.low_rank import thresholds
from pruningawaretraining.proximal.maps import ElementMap, NMSparseConstraint, Scale
from pruningawaretraining.proximal.parts import HALF, Part, accumulation_dtype
from pruningawaretraining.proximal.sharding import Shards, check_whole_groups, local, local_labels

PAIRWISE = 8
"""Groups of up to so many elements are ranked by comparing all pairs, larger ones by sorting."""


class LassoPlan:
    """Soft thresholding of elements."""

    def __init__(self, grouper: Grouper, parts: Sequence[Part], slope: float) -> None:
        self.jobs: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for part in parts:
            source, target = local(part.source), local(part.target)
            slope_W = _slope_of(grouper, part, slope) if slope else None
            self.jobs.append((source, target, slope_W))

    def run(self, scale: Scale, fraction: float) -> None:
        """Take one proximal step."""
        for source, target, slope_W in self.jobs:
            if slope_W is None and isinstance(scale, (int, float)) and source.dtype not in HALF:
                torch.ops.aten.softshrink.out(source, float(scale), out=target)
                continue
            limit = (slope_W if slope_W is not None else torch.ones((), device=source.device)) * scale
            wide = source.to(accumulation_dtype(source.dtype))
            target.copy_(wide - wide.clamp(-limit, limit))


def _slope_of(grouper: Grouper, part: Part, slope: float) -> Tensor:
    """The multiplier of each element's threshold, broadcastable to the (local) weight."""
    source = local(part.source)
    wide = source.new_empty(0, dtype=accumulation_dtype(source.dtype))
    values = thresholds(slope, grouper.n_groups(part.source.shape), wide)
    labels, sizes = local_labels(part.source, *grouper.labels(part.source.shape))
    return Member(part.name, source, labels, sizes).spread(values, 1.0)


class RankedPlan:
    """The largest elements of every group stay (N:M sparsity)."""

    def __init__(self, prox: NMSparseConstraint, grouper: Grouper, parts: Sequence[Part]) -> None:
        self.kept = prox.n_nonzero
        self.jobs: list[tuple[Block, Block]] = []
        for part in parts:
            if Shards.of(part.source) is not None:
                check_whole_groups(part.source, *grouper.labels(part.source.shape), part.name)
            self.jobs += zip(grouper.blocks(local(part.source)), grouper.blocks(local(part.target)), strict=True)

    def run(self, scale: Scale, fraction: float) -> None:
        """Take one proximal step."""
        for source, target in self.jobs:
            keep_largest(source, target, self.kept)


def keep_largest(source: Block, target: Block, kept: int) -> None:
    """Copy a block with all but the ``kept`` elements of largest magnitude of each group set to 0."""
    size = 1
    for dim in source.dims:
        size *= source.view.shape[dim]
    if kept >= size:
        if source.view.data_ptr() != target.view.data_ptr():
            target.view.copy_(source.view)
    elif kept == 0:
        target.view.zero_()
    elif len(source.dims) == 1 and size <= PAIRWISE:
        dim = source.dims[0]
        magnitudes = [element.abs() for element in source.view.unbind(dim)]
        keep = torch.stack(ranked(magnitudes, kept), dim)
        torch.mul(source.view, keep, out=target.view)
    else:
        last = tuple(range(-len(source.dims), 0))
        moved = source.view.movedim(source.dims, last)
        flat_K = moved.flatten(-len(source.dims)) if source.dims else moved.unsqueeze(-1)
        order = flat_K.abs().sort(dim=-1, descending=True, stable=True).indices
        result = flat_K.scatter(-1, order[..., kept:], 0.0)
        target.view.movedim(target.dims, last).copy_(result.view(moved.shape))


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


def element_plan(prox: ElementMap, grouper: Grouper, parts: Sequence[Part], slope: float) -> LassoPlan | RankedPlan:
    """A plan for a map of single elements."""
    if isinstance(prox, NMSparseConstraint):
        return RankedPlan(prox, grouper, parts)
    return LassoPlan(grouper, parts, slope)
