"""Plans for group maps: a proximal step laid out once for given weights, then run without a look at any value.

Shape suffixes: ``_R`` rows of all the weights of a stage (one for each slot of each weight), ``_G`` groups, ``_W`` any
weight.

A weight's latent is the source, the weight itself the target: one pass reads the latent for the norms, a second one
writes latent times factor into the weight. Nothing is copied on the way, but for small weights where launches cost more
than copies (:mod:`pruningawaretraining.proximal.pools`). Norms of all weights land side by side in one vector, so that
thresholds and factors are a handful of small operations however many weights there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pruningawaretraining.distributed.fsdp import Shards, local_labels, local_of
from pruningawaretraining.groups import kernels as fused
from pruningawaretraining.groups.grouping import Member
from pruningawaretraining.proximal.coupled import Balance
from pruningawaretraining.proximal.groupers import Grouper, GroupView, others
from pruningawaretraining.proximal.low_rank import thresholds
from pruningawaretraining.proximal.maps import GroupMap, ProxGroupLasso, Scale
from pruningawaretraining.proximal.runs import Runs
from pruningawaretraining.proximal.stages import BlockStage, Entry, MatrixRows, build_stages
from pruningawaretraining.proximal.weight_pairs import WeightPair


class NormPlan:
    """Groups that are multiplied by a factor of their norm.

    Args:
        prox: the map.
        entries: the weights' rows.
        slope: see :class:`GroupOptions`.
        pool: whether small weights are worked on together.
        total: number of groups, where rows are mapped to groups.
        runs: groups ranked among themselves; None for one run per weight.
        balance: how sets of coupled groups compare; None for groups of single weights.
        comm: whether groups span shards, or are ranked over all of them.
        loose: weights in no group.
    """

    def __init__(
        self,
        prox: GroupMap,
        entries: Sequence[Entry],
        slope: float,
        pool: bool,
        total: int | None = None,
        runs: Sequence[slice] | None = None,
        balance: Balance | None = None,
        comm: bool = True,
        loose: Sequence[WeightPair] = (),
    ) -> None:
        self.prox, self.loose = prox, CopyPlan(loose)
        self.stages = build_stages(entries, comm, pool, in_order=slope != 0)
        ordered = [entry for stage in self.stages for entry in stage.entries]
        home = self.stages[0].rows_R
        counts = torch.cat([_full(entry.sizes, entry.rows) for entry in ordered]).to(home)
        self.group_R: Tensor | None = None
        self.runs: Sequence[slice]
        if total is None:
            self.sizes_G, starts = counts, [0]
            for entry in ordered:
                starts.append(starts[-1] + entry.rows)
            self.runs = [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]
        else:
            self.group_R = torch.cat([entry.slots.to(home.device) for entry in ordered if entry.slots is not None])
            sums = counts.new_zeros(total + 1).index_add_(0, self.group_R, counts)
            self.sizes_G, self.runs = sums[:-1].clamp_(min=1), list(runs or [slice(0, total)])
        slopes_G = [thresholds(slope, run.stop - run.start, counts) for run in self.runs] if slope else []
        self.base_G = self.sizes_G.sqrt() * (torch.cat(slopes_G) if slope else 1.0)
        self.balance = None if balance is None else balance.to(home.device)
        if pool and prox.hard:
            self.runs = Runs.on(self.runs, home.device) or self.runs
        alone = total is None and balance is None and isinstance(prox, ProxGroupLasso)
        self.shrinking = self._matrices() if alone else None

    def _matrices(self) -> list[MatrixRows] | None:
        """Input of the compiled pass; None if it does not apply."""
        stage = self.stages[0]
        able = len(self.stages) == 1 and isinstance(stage, BlockStage) and fused.kernels() is not None
        return stage.rows_of_memory() if able and isinstance(stage, BlockStage) else None

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
            factors_G = factors_G.masked_fill(protected_G, 1.0)
        self._multiply(factors_G)
        self.loose.run(scale, fraction)

    def _shrink(self, scale: Scale) -> None:
        """The group lasso of rows that lie together in memory: one pass over every weight."""
        kernels, stage = fused.kernels(), self.stages[0]
        assert kernels is not None and self.shrinking is not None and isinstance(stage, BlockStage)
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
            if factors_G is not stage.rows_R:  # a map may have overwritten the norms
                stage.rows_R.copy_(factors_G[start : start + len(stage.rows_R)])
            start += len(stage.rows_R)
            stage.multiply()


def _full(size: Tensor | int, rows: int) -> Tensor:
    return torch.full((rows,), size) if isinstance(size, int) else size


def grouper_plan(prox: GroupMap, grouper: Grouper, parts: Sequence[WeightPair], slope: float, pool: bool) -> NormPlan:
    """A plan for weights that are grouped one by one."""
    entries: list[Entry] = []
    comm = prox.hard
    for part in parts:
        rows, size = grouper.n_groups(part.source.shape), grouper.group_size(part.source.shape)
        if Shards.of(part.source) is None:
            pairs = zip(grouper.blocks(local_of(part.source)), grouper.blocks(local_of(part.target)), strict=True)
            entries.append(Entry(part, rows, size, tuple(pairs), grouper.group_shape(part.source.shape)))
        else:
            labels, sizes = local_labels(part.source, *grouper.labels(part.source.shape))
            comm |= not _own_groups(part.source, labels, sizes)
            entries.append(Entry(part, rows, size, member=Member(part.name, local_of(part.source), labels, sizes)))
    return NormPlan(prox, entries, slope, pool, comm=comm)


def _own_groups(weight_W: Tensor, labels: Sequence[Tensor | None], sizes: Sequence[int]) -> bool:
    """Whether no group spans several shards: along every sharded dimension each entry is a group of its own."""
    shards = Shards.of(weight_W)
    assert shards is not None
    return all(labels[dim] is not None and sizes[dim] == weight_W.shape[dim] for dim in shards.dims(weight_W))


def coupled_plan(
    prox: GroupMap,
    members: Sequence[tuple[WeightPair, Member]],
    loose: Sequence[WeightPair],
    total: int,
    runs: Sequence[slice],
    slope: float,
    balance: Balance,
    pool: bool,
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
        pool: whether small weights are worked on together.
    """
    entries: list[Entry] = []
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
            pair = (GroupView(local_of(part.source), dims), GroupView(local_of(part.target), dims))
            entries.append(Entry(part, member.n_slots, sizes_S, (pair,), (member.n_slots,), slots=slots))
        else:
            labels, sizes = local_labels(part.source, member.labels, member.sizes)
            own = Member(part.name, local_of(part.source), labels, sizes)
            entries.append(Entry(part, member.n_slots, sizes_S, member=own, slots=slots))
    if not entries:
        return CopyPlan(loose)
    return NormPlan(prox, entries, slope, pool, total, runs, balance, loose=loose)


class CopyPlan:
    """Weights that are in no group (any more): they are their latents."""

    def __init__(self, parts: Sequence[WeightPair]) -> None:
        self.targets, self.sources = [part.target for part in parts], [part.source for part in parts]

    def run(self, scale: Scale, fraction: float) -> None:
        """Copy."""
        if self.targets:
            torch._foreach_copy_(self.targets, self.sources)
