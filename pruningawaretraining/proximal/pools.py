"""Pools: many small weights side by side in one buffer, so that an operation on all of them is one.

Shape suffixes: ``_W`` any weight, ``_N`` the elements of a pool.

On a GPU a small operation costs what it takes to launch it, some microseconds, and not what it computes. Weights whose
groups lie alike in memory (all rows of 576 elements, say) are one matrix when they lie one below the other. Two fused
copies bring the weights of a pool in and out, and between them each *class* of alike weights is one block. Weights
that are large enough to keep the device busy alone stay where they are: copying them would cost more than a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from pruningawaretraining.proximal.groupers import GroupView

ALONE = 2**21
"""A weight of more elements than this is worth launches of its own."""
CAPACITY = 2**25
"""Elements of the largest pool; the smallest weights go first."""
PASSING = 2**24
"""Elements of a pool that is run through in one go, so that several can use one buffer after the other."""

Key: TypeAlias = tuple[torch.device, torch.dtype, tuple[int, ...], tuple[int, ...]]


def pays(device: torch.device) -> bool:
    """Whether operations on a device cost their launch, so that fewer are faster."""
    return device.type != "cpu"


@dataclass(frozen=True)
class Form:
    """How the groups of a weight lie in its memory: dimensions from the outermost to the innermost, with neighbours of
    one kind merged.

    Args:
        lead: groups along the outermost dimension (1 where that one lies within a group).
        rest: sizes of the other dimensions.
        dims: which of ``(lead, *rest)`` lie within a group.
        groups_in_order: whether memory has the groups in the grouper's order.
        members_in_order: whether memory has the elements of a group in the grouper's order.
    """

    lead: int
    rest: tuple[int, ...]
    dims: tuple[int, ...]
    groups_in_order: bool
    members_in_order: bool

    @classmethod
    def of(cls, block: GroupView) -> Form | None:
        """The form of a weight that is one block; None if it has gaps or overlaps."""
        view, within = block.view, set(block.dims)
        order = [dim for dim in range(view.dim()) if view.shape[dim] != 1]
        order.sort(key=view.stride, reverse=True)
        expected = 1
        for dim in reversed(order):
            if view.stride(dim) != expected or view.shape[dim] == 0:
                return None
            expected *= view.shape[dim]
        merged: list[tuple[bool, int]] = []
        for dim in order:
            if merged and merged[-1][0] == (dim in within):
                merged[-1] = (dim in within, merged[-1][1] * view.shape[dim])
            else:
                merged.append((dim in within, view.shape[dim]))
        if not merged or merged[0][0]:
            merged.insert(0, (False, 1))
        dims = tuple(index for index, (inside, _) in enumerate(merged) if inside)
        outer, inner = [dim for dim in order if dim not in within], [dim for dim in order if dim in within]
        rest = tuple(size for _, size in merged[1:])
        return cls(merged[0][1], rest, dims, outer == sorted(outer), inner == sorted(inner))


@dataclass(frozen=True, eq=False)
class Job:
    """A candidate for a pool.

    Args:
        index: of the job among all of its plan.
        source: the latent.
        target: the weight.
        form: how its groups lie in memory; None for a weight that stays alone.
    """

    index: int
    source: Tensor
    target: Tensor
    form: Form | None

    @classmethod
    def of(
        cls,
        index: int,
        weights: tuple[Tensor, Tensor],
        blocks: Sequence[tuple[GroupView, GroupView]],
        groups_in_order: bool = False,
        members_in_order: bool = False,
    ) -> Job:
        """A job, if the weight is one block and its latent lies in memory as itself does.

        Args:
            index: of the job.
            weights: the latent and the weight.
            blocks: the two, cut into blocks.
            groups_in_order, members_in_order: whether the order of groups, or within them, has to be the grouper's.
        """
        source, target = weights
        form = Form.of(blocks[0][0]) if len(blocks) == 1 else None
        alike = source.stride() == target.stride() and source.dtype == target.dtype and source.device == target.device
        if form is None or not alike or source.dim() == 0:
            return cls(index, source, target, None)
        fits = (form.groups_in_order or not groups_in_order) and (form.members_in_order or not members_in_order)
        return cls(index, source, target, form if fits else None)

    @property
    def key(self) -> Key:
        """Jobs of one key are one block."""
        assert self.form is not None
        return self.source.device, self.source.dtype, self.form.rest, self.form.dims


class Pool:
    """Weights of one device and dtype that are worked on together.

    Args:
        jobs: the weights.
        buffer_N: where they are put; it may be longer.
    """

    def __init__(self, jobs: Sequence[Job], buffer_N: Tensor) -> None:
        classes: dict[Key, list[Job]] = {}
        for job in jobs:
            classes.setdefault(job.key, []).append(job)
        self.buffer_N = buffer_N[: sum(job.source.numel() for job in jobs)]
        self.indices: list[int] = []
        self.blocks: list[GroupView] = []
        self.sources: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.slots: list[Tensor] = []
        start = 0
        for alike in classes.values():
            first = start
            for job in alike:
                size = job.source.numel()
                self.indices.append(job.index)
                self.sources.append(job.source.as_strided((size,), (1,)))
                self.targets.append(job.target.as_strided((size,), (1,)))
                self.slots.append(self.buffer_N[start : start + size])
                start += size
            forms = [job.form for job in alike if job.form is not None]
            shape = (sum(form.lead for form in forms), *forms[0].rest)
            self.blocks.append(GroupView(self.buffer_N[first:start].view(shape), forms[0].dims))

    def load(self) -> None:
        """Bring the latents in."""
        torch._foreach_copy_(self.slots, self.sources)

    def store(self) -> None:
        """Bring what is in the pool out, into the weights."""
        torch._foreach_copy_(self.targets, self.slots)


def groups_in(block: GroupView) -> tuple[int, ...]:
    """The shape of a tensor with one value for each group of a pool's block."""
    return tuple(size for dim, size in enumerate(block.view.shape) if dim not in block.dims)


def pooled(jobs: Sequence[Job], largest: int, capacity: int, several: bool) -> list[Pool]:
    """Pools of the jobs that gain by it: those that are not large, and not the only ones of their form.

    Args:
        jobs: all the jobs of a plan; what no pool has is to be done alone.
        largest: elements of the largest weight that goes into a pool.
        capacity: elements of a pool.
        several: whether further pools take what does not fit into the first; all use one buffer, one after the other.
    """
    able = sorted((job for job in jobs if job.form is not None and job.source.numel() <= largest), key=_size)
    counts: dict[Key, int] = {}
    for job in able:
        counts[job.key] = counts.get(job.key, 0) + 1
    by_place: dict[tuple[torch.device, torch.dtype], list[Job]] = {}
    for job in able:
        if counts[job.key] > 1:
            by_place.setdefault(job.key[:2], []).append(job)
    found = []
    for (device, dtype), here in by_place.items():
        batches = _batches(here, capacity)[: None if several else 1]
        sizes = [sum(map(_size, batch)) for batch in batches]
        buffer_N = torch.empty(max(sizes, default=0), dtype=dtype, device=device)
        found += [Pool(batch, buffer_N) for batch in batches]
    return found


def _size(job: Job) -> int:
    return job.source.numel()


def _batches(jobs: Sequence[Job], capacity: int) -> list[list[Job]]:
    """Jobs in order, cut where a batch would outgrow the capacity."""
    found: list[list[Job]] = []
    room = 0
    for job in jobs:
        if _size(job) > room:
            found.append([])
            room = max(capacity, _size(job))
        found[-1].append(job)
        room -= _size(job)
    return found
