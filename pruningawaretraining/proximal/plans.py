"""Plans for group maps: a proximal step laid out once for given weights, then run without a look at any value.

Shape suffixes: ``_R`` rows of all the weights of a stage (one for each slot of each weight), ``_G`` groups, ``_W`` any
weight.

A weight's latent is the source, the weight itself the target, and nothing is copied on the way: one pass reads the
latent for the norms, a second one writes latent times factor into the weight. Norms of all weights land side by side
in one vector, so that thresholds and factors are a handful of small operations however many weights there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruningawaretraining import fused
from pruningawaretraining.grouping import Member
from pruningawaretraining.proximal.coupled import Balance
from pruningawaretraining.proximal.groupers import Block, Grouper, others
from pruningawaretraining.proximal.low_rank import thresholds
from pruningawaretraining.proximal.maps import GroupMap, ProxGroupLasso, Scale
from pruningawaretraining.proximal.parts import Part, accumulation_dtype
from pruningawaretraining.proximal.sharding import Shards, all_reduce_, local, local_labels


@dataclass(frozen=True, eq=False)
class _Entry:
    """A weight's rows in a stage: as blocks of whole tensors, or as labels of a shard."""

    part: Part
    rows: int
    blocks: tuple[tuple[Block, Block], ...] = ()
    shape: tuple[int, ...] = ()
    member: Member | None = None


@dataclass(frozen=True, eq=False)
class _Rows:
    """A weight as matrices whose rows are its groups, and the row's thresholds: numpy arrays."""

    source_RN: Any
    target_RN: Any
    threshold_R: Any


class _BlockStage:
    """Rows of whole (unsharded) weights on one device."""

    def __init__(self, entries: Sequence[_Entry], like: Tensor) -> None:
        total = sum(entry.rows for entry in entries)
        self.rows_R = torch.zeros(total, dtype=accumulation_dtype(like.dtype), device=like.device)
        self.norms: list[tuple[Tensor, tuple[int, ...], Tensor]] = []
        self.products: list[tuple[Tensor, Tensor, Tensor]] = []
        start, self.entries = 0, tuple(entries)
        for entry in entries:
            values_G = self.rows_R[start : start + entry.rows].view(entry.shape)
            start += entry.rows
            for source, target in entry.blocks:
                self.norms.append((source.view, source.dims, source.groups_of(values_G)))
                self.products.append((source.view, source.broadcast(values_G), target.view))

    def measure(self) -> None:
        """Fill the rows with L2 norms."""
        for view, dims, out in self.norms:
            if dims:
                torch.linalg.vector_norm(view, 2, dims, dtype=self.rows_R.dtype, out=out)
            else:
                torch.abs(view, out=out)

    def multiply(self) -> None:
        """Write source times row into the targets."""
        for source, factor, target in self.products:
            torch.mul(source, factor, out=target)

    def rows_of_memory(self) -> list[_Rows] | None:
        """The blocks as matrices whose rows are the groups, for the compiled pass; None if some block is none."""
        found, start = [], 0
        for entry in self.entries:
            threshold_R = self.rows_R[start : start + entry.rows]
            start += entry.rows
            source, target = entry.blocks[0]
            whole = len(entry.blocks) == 1 and source.dims == tuple(range(1, source.view.dim()))
            if not (whole and fused.fits(source.view) and fused.fits(target.view)):
                return None
            found.append(_Rows(fused.as_matrix(source.view), fused.as_matrix(target.view), threshold_R.numpy()))
        return found


class _LabelStage:
    """Rows of shards (or of members labelled along several dimensions) on one device."""

    def __init__(self, entries: Sequence[_Entry], like: Tensor, shards: Shards | None) -> None:
        total = sum(entry.rows for entry in entries)
        self.rows_R = torch.zeros(total, dtype=accumulation_dtype(like.dtype), device=like.device)
        self.entries, self.shards = tuple(entries), shards

    def measure(self) -> None:
        """Fill the rows with L2 norms, over all the shards."""
        for entry, rows in zip(self.entries, self._split(), strict=True):
            assert entry.member is not None
            rows.copy_(entry.member.slot_sums(local(entry.part.source).to(rows.dtype).square()))
        if self.shards is not None:
            all_reduce_(self.rows_R, self.shards)
        self.rows_R.sqrt_()

    def multiply(self) -> None:
        """Write source times row into the targets."""
        for entry, rows in zip(self.entries, self._split(), strict=True):
            assert entry.member is not None
            torch.mul(local(entry.part.source), entry.member.spread(rows, 1.0), out=local(entry.part.target))

    def _split(self) -> tuple[Tensor, ...]:
        return torch.split(self.rows_R, [entry.rows for entry in self.entries])


class NormPlan:
    """Groups that are multiplied by a factor of their norm.

    Args:
        prox: the map.
        entries: the weights' rows, and for each the group of every row (None where each row is a group of its own).
        sizes: for each entry, elements of every row.
        slope: see :class:`GroupOptions`.
        total: number of groups, where rows are mapped to groups.
        runs: groups ranked among themselves; None for one run per weight.
        balance: how sets of coupled groups compare; None for groups of single weights.
        comm: whether groups span shards, or are ranked over all of them.
        loose: weights in no group.
    """

    def __init__(
        self,
        prox: GroupMap,
        entries: Sequence[tuple[_Entry, Tensor | None, Tensor | int]],
        slope: float,
        total: int | None = None,
        runs: Sequence[slice] | None = None,
        balance: Balance | None = None,
        comm: bool = True,
        loose: Sequence[Part] = (),
    ) -> None:
        self.prox, self.loose = prox, CopyPlan(loose)
        order = _by_stage([entry for entry, _, _ in entries], comm)
        self.stages: list[_BlockStage | _LabelStage] = [_stage(key, [entries[i][0] for i in ids]) for key, ids in order]
        ordered = [entries[index] for _, ids in order for index in ids]
        home = self.stages[0].rows_R
        counts = torch.cat([_full(size, entry.rows) for entry, _, size in ordered]).to(home)
        self.group_R: Tensor | None = None
        if total is None:
            self.sizes_G, starts = counts, [0]
            for entry, _, _ in ordered:
                starts.append(starts[-1] + entry.rows)
            self.runs = [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]
        else:
            self.group_R = torch.cat([slots for _, slots, _ in ordered if slots is not None]).to(home.device)
            sums = counts.new_zeros(total + 1).index_add_(0, self.group_R, counts)
            self.sizes_G, self.runs = sums[:-1].clamp_(min=1), list(runs or [slice(0, total)])
        slopes_G = [thresholds(slope, run.stop - run.start, counts) for run in self.runs] if slope else []
        self.base_G = self.sizes_G.sqrt() * (torch.cat(slopes_G) if slope else 1.0)
        self.balance = None if balance is None else balance.to(home.device)
        stage = self.stages[0]
        alone = total is None and balance is None and len(self.stages) == 1 and isinstance(prox, ProxGroupLasso)
        able = alone and isinstance(stage, _BlockStage) and fused.kernels() is not None
        self.shrinking = stage.rows_of_memory() if able and isinstance(stage, _BlockStage) else None

    def norms_G(self) -> Tensor:
        """L2 norm of every group, now."""
        for stage in self.stages:
            stage.measure()
        home = self.stages[0].rows_R
        several = len(self.stages) > 1
        rows_R = torch.cat([stage.rows_R.to(home) for stage in self.stages]) if several else home
        if self.group_R is None:
            return rows_R
        sums = rows_R.new_zeros(len(self.sizes_G) + 1).index_add_(0, self.group_R, rows_R.square())
        return sums[:-1].sqrt_()

    def ratios_G(self) -> Tensor:
        """The smallest ``reg_lambda * gamma`` that zeroes each group."""
        ratio_G = self.norms_G() / self.base_G
        return ratio_G if self.balance is None else ratio_G / self.balance.units_G(ratio_G)

    def run(self, scale: Scale, fraction: float) -> None:
        """Take one proximal step.

        Args:
            scale: ``reg_lambda * gamma``.
            fraction: of the groups, to be zeroed by a hard map.
        """
        if self.shrinking is not None:
            self._shrink(scale)
            return
        norms_G, base_G, protected_G = self.norms_G(), self.base_G, None
        if self.balance is not None:
            ratio_G = norms_G / base_G
            protected_G = self.balance.protected_G(ratio_G)
            base_G = base_G * self.balance.units_G(ratio_G)
        none = isinstance(scale, (int, float)) and scale == 0
        threshold_G = None if none else base_G * scale
        factors_G = self.prox.factors(norms_G, self.sizes_G, threshold_G, self.runs, fraction)
        if protected_G is not None:
            factors_G = torch.where(protected_G, 1.0, factors_G)
        self._multiply(factors_G)
        self.loose.run(scale, fraction)

    def _shrink(self, scale: Scale) -> None:
        """The group lasso of rows that lie together in memory: one pass over every weight."""
        kernels, stage = fused.kernels(), self.stages[0]
        assert kernels is not None and self.shrinking is not None and isinstance(stage, _BlockStage)
        torch.mul(self.base_G, scale, out=stage.rows_R)
        for one in self.shrinking:
            kernels.shrink_rows(one.source_RN, one.target_RN, one.threshold_R)
        torch.autograd.graph.increment_version([entry.part.target for entry in stage.entries])
        self.loose.run(scale, 0.0)

    def _multiply(self, factors_G: Tensor) -> None:
        if self.group_R is not None:
            factors_G = torch.cat([factors_G, factors_G.new_ones(1)])[self.group_R]
        start = 0
        for stage in self.stages:
            part_R = factors_G[start : start + len(stage.rows_R)]
            if part_R.data_ptr() != stage.rows_R.data_ptr():
                stage.rows_R.copy_(part_R)
            start += len(part_R)
            stage.multiply()


def _full(size: Tensor | int, rows: int) -> Tensor:
    return torch.full((rows,), size) if isinstance(size, int) else size


def _by_stage(entries: Sequence[_Entry], comm: bool) -> list[tuple[tuple[object, ...], list[int]]]:
    """Which entries share a stage: those of one device and dtype, and of one way to reduce."""
    found: dict[tuple[object, ...], list[int]] = {}
    for index, entry in enumerate(entries):
        source = entry.part.source
        shards = Shards.of(source) if entry.member is not None and comm else None
        key = (local(source).device, accumulation_dtype(source.dtype), entry.member is not None, shards)
        found.setdefault(key, []).append(index)
    return list(found.items())


def _stage(key: tuple[object, ...], entries: Sequence[_Entry]) -> _BlockStage | _LabelStage:
    like = local(entries[0].part.source)
    shards = key[3]
    if not key[2]:
        return _BlockStage(entries, like)
    return _LabelStage(entries, like, shards if isinstance(shards, Shards) else None)


def grouper_plan(prox: GroupMap, grouper: Grouper, parts: Sequence[Part], slope: float) -> NormPlan:
    """A plan for weights that are grouped one by one."""
    entries: list[tuple[_Entry, Tensor | None, Tensor | int]] = []
    comm = prox.hard
    for part in parts:
        rows, size = grouper.n_groups(part.source.shape), grouper.group_size(part.source.shape)
        if Shards.of(part.source) is None:
            pairs = zip(grouper.blocks(local(part.source)), grouper.blocks(local(part.target)), strict=True)
            shape = grouper.group_shape(part.source.shape)
            entries.append((_Entry(part, rows, tuple(pairs), shape), None, size))
        else:
            labels, sizes = local_labels(part.source, *grouper.labels(part.source.shape))
            comm |= not _own_groups(part.source, labels, sizes)
            member = Member(part.name, local(part.source), labels, sizes)
            entries.append((_Entry(part, rows, member=member), None, size))
    return NormPlan(prox, entries, slope, comm=comm)


def _own_groups(weight_W: Tensor, labels: Sequence[Tensor | None], sizes: Sequence[int]) -> bool:
    """Whether no group spans several shards: along every sharded dimension each entry is a group of its own."""
    shards = Shards.of(weight_W)
    assert shards is not None
    return all(labels[dim] is not None and sizes[dim] == weight_W.shape[dim] for dim in shards.dims(weight_W))


def coupled_plan(
    prox: GroupMap,
    members: Sequence[tuple[Part, Member]],
    loose: Sequence[Part],
    total: int,
    runs: Sequence[slice],
    slope: float,
    balance: Balance,
) -> NormPlan | CopyPlan:
    """A plan for groups over several weights.

    Args:
        prox: the map.
        members: each weight's parts in the groups, in the shape of the whole (unsharded) weight.
        loose: weights that are in no group any more.
        total: number of groups.
        runs: the sets.
        slope: see :class:`GroupOptions`.
        balance: how the sets compare.
    """
    entries: list[tuple[_Entry, Tensor | None, Tensor | int]] = []
    for part, member in members:
        slots = member.slots
        if slots is None:
            slots = torch.arange(member.offset, member.offset + member.n_slots)
        labelled = [dim for dim, label in enumerate(member.labels) if label is not None]
        plain = len(labelled) == 1 and member.identity[labelled[0]] and Shards.of(part.source) is None
        ones = torch.ones((), dtype=torch.float64).expand(part.source.shape)
        sizes_S = member.slot_sums(ones)
        if plain:
            dims = others(part.source.dim(), labelled[0])
            pair = (Block(local(part.source), dims), Block(local(part.target), dims))
            entry = _Entry(part, member.n_slots, (pair,), (member.n_slots,))
        else:
            labels, sizes = local_labels(part.source, member.labels, member.sizes)
            entry = _Entry(part, member.n_slots, member=Member(part.name, local(part.source), labels, sizes))
        entries.append((entry, slots, sizes_S))
    if not entries:
        return CopyPlan(loose)
    return NormPlan(prox, entries, slope, total, runs, balance, loose=loose)


class CopyPlan:
    """Weights that are in no group (any more): they are their latents."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.targets, self.sources = [part.target for part in parts], [part.source for part in parts]

    def run(self, scale: Scale, fraction: float) -> None:
        """Copy."""
        if self.targets:
            torch._foreach_copy_(self.targets, self.sources)
