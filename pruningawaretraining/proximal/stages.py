"""Stages of a plan: norms of rows, and their products with factors, for weights of one device and one way to reduce.

Shape suffixes: ``_R`` rows of all the weights of a stage (one for each slot of each weight), ``_G`` groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruningawaretraining.distributed.fsdp import Shards, local_of
from pruningawaretraining.groups import kernels as fused
from pruningawaretraining.groups.grouping import Member
from pruningawaretraining.proximal.groupers import GroupView
from pruningawaretraining.proximal.pools import ALONE, CAPACITY, Job, Pool, groups_in, pooled
from pruningawaretraining.proximal.weight_pairs import WeightPair, accumulation_dtype


@dataclass(frozen=True, eq=False)
class Entry:
    """A weight's rows in a stage: as blocks of whole tensors, or as labels of a shard.

    Args:
        part: the weight.
        rows: how many.
        sizes: elements of every row, or of each.
        blocks: views of latent and weight.
        shape: of a tensor with a value for each row, where there are blocks.
        member: labels, where there are no blocks.
        slots: the group of every row; None where each row is a group of its own.
    """

    part: WeightPair
    rows: int
    sizes: Tensor | int
    blocks: tuple[tuple[GroupView, GroupView], ...] = ()
    shape: tuple[int, ...] = ()
    member: Member | None = None
    slots: Tensor | None = None


@dataclass(frozen=True, eq=False)
class MatrixRows:
    """A weight as matrices whose rows are its groups, and the row's thresholds: numpy arrays."""

    source_RN: Any
    target_RN: Any
    threshold_R: Any


class BlockStage:
    """Rows of whole (unsharded) weights on one device.

    Args:
        entries: the weights. ``self.entries`` has them in the order of the rows: those of the pool come first.
        pool: whether small weights are worked on together.
        in_order: whether the rows of each weight have to be in the grouper's order.
    """

    def __init__(self, entries: Sequence[Entry], pool: bool, in_order: bool) -> None:
        like = local_of(entries[0].part.source)
        self.rows_R = torch.zeros(
            sum(entry.rows for entry in entries), dtype=accumulation_dtype(like.dtype), device=like.device
        )
        self.norms: list[tuple[Tensor, tuple[int, ...], Tensor]] = []
        self.products: list[tuple[Tensor, Tensor, Tensor]] = []
        self.pool = _pool(entries, in_order) if pool else None
        inside = [] if self.pool is None else self.pool.indices
        alone = sorted(set(range(len(entries))).difference(inside))
        self.entries = tuple(entries[index] for index in (*inside, *alone))
        start = 0
        for block in [] if self.pool is None else self.pool.blocks:
            shape = groups_in(block)
            values_G = self.rows_R[start : start + math.prod(shape)].view(shape)
            start += values_G.numel()
            self._add(block, block, values_G)
        for entry in self.entries[len(inside) :]:
            values_G = self.rows_R[start : start + entry.rows].view(entry.shape)
            start += entry.rows
            for source, target in entry.blocks:
                self._add(source, target, values_G)

    def _add(self, source: GroupView, target: GroupView, values_G: Tensor) -> None:
        self.norms.append((source.view, source.dims, source.groups_of(values_G)))
        self.products.append((source.view, source.broadcast(values_G), target.view))

    def measure(self) -> None:
        """Fill the rows with L2 norms."""
        if self.pool is not None:
            self.pool.load()
        for view, dims, out in self.norms:
            if dims:
                torch.linalg.vector_norm(view, 2, dims, dtype=self.rows_R.dtype, out=out)
            else:
                torch.abs(view.to(out.dtype), out=out)

    def multiply(self) -> None:
        """Write source times row into the targets; the rows have been measured just before."""
        for source, factor, target in self.products:
            torch.mul(source, factor, out=target)
        if self.pool is not None:
            self.pool.store()

    def rows_of_memory(self) -> list[MatrixRows] | None:
        """The blocks as matrices whose rows are the groups, for the compiled pass; None if a block has another form."""
        if self.pool is not None:
            return None
        found, start = [], 0
        for entry in self.entries:
            threshold_R = self.rows_R[start : start + entry.rows]
            start += entry.rows
            source, target = entry.blocks[0]
            whole = len(entry.blocks) == 1 and source.dims == tuple(range(1, source.view.dim()))
            if not (whole and fused.fits(source.view) and fused.fits(target.view)):
                return None
            found.append(MatrixRows(fused.as_matrix(source.view), fused.as_matrix(target.view), threshold_R.numpy()))
        return found


def _pool(entries: Sequence[Entry], in_order: bool) -> Pool | None:
    """The pool of a stage's small weights, if there are any."""
    jobs = [
        Job.of(
            index, (local_of(entry.part.source), local_of(entry.part.target)), entry.blocks, groups_in_order=in_order
        )
        for index, entry in enumerate(entries)
    ]
    found = pooled(jobs, ALONE, CAPACITY, several=False)
    return found[0] if found else None


class LabelStage:
    """Rows of shards (or of members labelled along several dimensions) on one device."""

    def __init__(self, entries: Sequence[Entry], shards: Shards | None) -> None:
        like = local_of(entries[0].part.source)
        total = sum(entry.rows for entry in entries)
        self.rows_R = torch.zeros(total, dtype=accumulation_dtype(like.dtype), device=like.device)
        self.entries, self.shards = tuple(entries), shards

    def measure(self) -> None:
        """Fill the rows with L2 norms, over all the shards."""
        for entry, rows in zip(self.entries, self._split(), strict=True):
            assert entry.member is not None
            rows.copy_(entry.member.slot_sums(local_of(entry.part.source).to(rows.dtype).square()))
        if self.shards is not None:
            self.shards.all_reduce_(self.rows_R)
        self.rows_R.sqrt_()

    def multiply(self) -> None:
        """Write source times row into the targets."""
        for entry, rows in zip(self.entries, self._split(), strict=True):
            assert entry.member is not None
            torch.mul(local_of(entry.part.source), entry.member.spread(rows, 1.0), out=local_of(entry.part.target))

    def _split(self) -> tuple[Tensor, ...]:
        return torch.split(self.rows_R, [entry.rows for entry in self.entries])


def build_stages(entries: Sequence[Entry], comm: bool, pool: bool, in_order: bool) -> list[BlockStage | LabelStage]:
    """The stages of a plan: entries of one device, precision and way to reduce share one.

    Args:
        entries: all the weights.
        comm: whether groups span shards, or are ranked over all of them.
        pool, in_order: see :class:`BlockStage`.
    """
    found: dict[tuple[object, ...], list[Entry]] = {}
    shards_of: dict[tuple[object, ...], Shards | None] = {}
    for entry in entries:
        source = local_of(entry.part.source)
        shards = Shards.of(entry.part.source) if entry.member is not None and comm else None
        dtype = source.dtype if pool and entry.member is None else accumulation_dtype(source.dtype)
        key = (source.device, dtype, entry.member is not None, shards)
        found.setdefault(key, []).append(entry)
        shards_of[key] = shards
    return [
        BlockStage(here, pool, in_order) if here[0].member is None else LabelStage(here, shards_of[key])
        for key, here in found.items()
    ]
