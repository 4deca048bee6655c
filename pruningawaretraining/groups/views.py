"""Sums, maxima and views over the slots of a member, without index tensors where its labels are regular.

Shape suffixes: ``_W`` the shape of a weight, ``_F`` that shape with labelled dimensions split in two, ``_S`` slots.

Labels that count in blocks (0 0 1 1 2 2) or in turns (0 1 2 0 1 2) split their dimension into two: the label and the
place within the group. Summing a group is then a sum over a view, and spreading one value over a group is broadcasting.
Other labels (a last block that is not full) go the general way of
:class:`~pruningawaretraining.groups.grouping.Member`.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pruningawaretraining.distributed.fsdp import across, is_sharded, local_member, local_of
from pruningawaretraining.groups.grouping import Grouping, Member
from pruningawaretraining.groups.placed import placed


@dataclass(frozen=True)
class Fold:
    """View of a member's tensor in which every group lies along its own axes.

    Args:
        narrowed: (dimension, first, length) of dimensions of which only a part is in groups.
        shape: the view's shape.
        reduced: axes of the view that run within a group; the others run over slots.
        spread_shape: the shape in which one value for each slot broadcasts to the view.
    """

    narrowed: tuple[tuple[int, int, int], ...]
    shape: tuple[int, ...]
    reduced: tuple[int, ...]
    spread_shape: tuple[int, ...]

    @cached_property
    def flat(self) -> tuple[int, int, int] | None:
        """(P, R, Q): slots run along P and Q, groups along R between them; None where a group runs along two."""
        inside = [axis in self.reduced for axis in range(len(self.shape))]
        if not any(inside):
            return self.shape[0], 1, math.prod(self.shape[1:])
        first, last = inside.index(True), len(inside) - inside[::-1].index(True)
        if not all(inside[first:last]):
            return None
        return math.prod(self.shape[:first]), math.prod(self.shape[first:last]), math.prod(self.shape[last:])

    def view(self, values_W: Tensor) -> Tensor:
        """The folded view of a tensor shaped like the member; it shares the tensor's memory."""
        for dim, first, length in self.narrowed:
            values_W = values_W.narrow(dim, first, length)
        return values_W.view(self.shape)


_FOLDS: weakref.WeakKeyDictionary[Member, Fold | None] = weakref.WeakKeyDictionary()


def fold_of(member: Member) -> Fold | None:
    """The member's fold, or None where its labels are not regular."""
    if member not in _FOLDS:
        _FOLDS[member] = _fold(member)
    return _FOLDS[member]


def _fold(member: Member) -> Fold | None:
    narrowed: list[tuple[int, int, int]] = []
    shape: list[int] = []
    reduced: list[int] = []
    spread_shape: list[int] = []
    for dim, (label, size) in enumerate(zip(member.labels, member.sizes, strict=True)):
        length = member.parameter.shape[dim]
        axes = [(length, True)]
        if label is not None:
            found = _split(label.cpu(), size)
            if found is None:
                return None
            if math.prod(found) != length:
                narrowed.append((dim, int(torch.nonzero(label.cpu() < size)[0]), math.prod(found)))
            turns, groups, width = found
            axes = [one for one in ((turns, True), (groups, False), (width, True)) if one != (1, True)]
        for count, inside in axes:
            if inside:
                reduced.append(len(shape))
            shape.append(count)
            spread_shape.append(1 if inside else count)
    return Fold(tuple(narrowed), tuple(shape), tuple(reduced), tuple(spread_shape))


def _split(label: Tensor, size: int) -> tuple[int, int, int] | None:
    """(turns, groups of each turn, entries of each in a row) of a label vector, or None where it is irregular."""
    if size == len(label) == 0:
        return 1, 0, 1
    inside = torch.nonzero(label < size).flatten()
    if size == 0 or len(inside) == 0 or int(inside[-1] - inside[0]) + 1 != len(inside):
        return None
    run = label[inside]
    others = torch.nonzero(run).flatten()
    width = int(others[0]) if len(others) else len(run)
    if width == 0 or len(run) % (size * width) or not torch.equal(run, torch.arange(len(run)) // width % size):
        return None
    return len(run) // (size * width), size, width


def slot_sums(member: Member, values_W: Tensor) -> Tensor:
    """As :meth:`Member.slot_sums`, by a view where the labels are regular; of a DTensor over all processes."""
    if is_sharded(values_W):
        return across(slot_sums(local_member(member), local_of(values_W)).clone(), [values_W])
    fold = fold_of(member)
    if fold is None:
        return member.slot_sums(values_W)
    view_F = fold.view(values_W)
    return (view_F.sum(dim=fold.reduced) if fold.reduced else view_F).reshape(-1)


def slot_maxima(member: Member, values_W: Tensor) -> Tensor:
    """The largest entry of each slot: vector of ``n_slots`` (-inf for a slot without entries)."""
    if is_sharded(values_W):
        return across(slot_maxima(local_member(member), local_of(values_W)).clone(), [values_W], largest=True)
    if not values_W.numel():
        return values_W.new_full((member.n_slots,), -math.inf)
    fold = fold_of(member)
    if fold is not None:
        view_F = fold.view(values_W)
        return (view_F.amax(dim=fold.reduced) if fold.reduced else view_F).reshape(-1)
    largest = values_W
    for dim, label in enumerate(member.labels):
        if label is None:
            largest = largest.amax(dim=dim, keepdim=True)
        elif not member.identity[dim]:
            shape = list(largest.shape)
            shape[dim] = member.sizes[dim] + 1
            index = placed(label, largest.device).view([-1 if axis == dim else 1 for axis in range(largest.dim())])
            room = largest.new_full(shape, -math.inf)
            room.scatter_reduce_(dim, index.expand_as(largest), largest, "amax")
            largest = room.narrow(dim, 0, member.sizes[dim])
    return largest.reshape(-1)


_COUNTS: weakref.WeakKeyDictionary[Member, Tensor] = weakref.WeakKeyDictionary()


def slot_counts(member: Member) -> Tensor:
    """How many entries each slot has, float32 on the CPU, in a shape that broadcasts to ``member.sizes``; counted once,
    and never to be changed."""
    if member not in _COUNTS:
        _COUNTS[member] = _slot_counts(member)
    return _COUNTS[member]


def _slot_counts(member: Member) -> Tensor:
    counts = torch.ones([1] * len(member.sizes), device="cpu")
    for dim, (label, size) in enumerate(zip(member.labels, member.sizes, strict=True)):
        if label is None:
            counts = counts * member.parameter.shape[dim]
            continue
        per_label = torch.bincount(label.cpu(), minlength=size)[:size].float()
        if len(per_label) and bool((per_label == per_label[0]).all()):
            per_label = per_label[:1]
        counts = counts * per_label.view([-1 if axis == dim else 1 for axis in range(len(member.sizes))])
    return counts


def slots_of(grouping: Grouping, member: Member, values_G: Tensor) -> Tensor:
    """The member's own part of a vector over groups, for members whose slots are consecutive groups (a view)."""
    if member.slots is not None:
        raise ValueError(f"{member.name}: its slots are not consecutive groups of {grouping.name!r}")
    return values_G[member.offset : member.offset + member.n_slots]


def fill_groups(member: Member, values_W: Tensor, chosen_S: Tensor, value: float) -> None:
    """Write ``value`` in place over every entry of the chosen slots (bool); entries outside every group stay."""
    fold = fold_of(member)
    if fold is None:
        values_W.masked_fill_(member.spread(chosen_S, outside=0.0).bool(), value)
    else:
        fold.view(values_W).masked_fill_(chosen_S.view(fold.spread_shape), value)


def scale_groups(member: Member, values_W: Tensor, chosen_S: Tensor, factor: float) -> None:
    """Multiply every entry of the chosen slots (bool) with ``factor`` in place; entries outside every group stay. Of a
    DTensor this process's part."""
    if is_sharded(values_W):
        scale_groups(local_member(member), local_of(values_W), chosen_S, factor)
        return
    factor_S = torch.where(chosen_S.to(values_W.device), factor, 1.0).to(values_W.dtype)
    fold = fold_of(member)
    if fold is None:
        values_W.mul_(member.spread(factor_S, outside=1.0))
    else:
        fold.view(values_W).mul_(factor_S.view(fold.spread_shape))


def entry_vectors(member: Member, values_W: Tensor) -> Tensor:
    """The entries of every slot as a row, in the order of the tensor: [slots, entries], short rows ending in 0.

    This copies the tensor, and is meant for criteria that compare groups with each other.
    """
    gathered = values_W
    axes: list[tuple[int, int]] = []
    for dim, (label, size) in enumerate(zip(member.labels, member.sizes, strict=True)):
        axis = 2 * dim
        if label is None:
            gathered = gathered.unsqueeze(axis)
            axes.append((1, gathered.shape[axis + 1]))
            continue
        places, present = _places(label.cpu(), size)
        flat = gathered.index_select(axis, places.flatten().to(gathered.device))
        gathered = flat.view(*flat.shape[:axis], *places.shape, *flat.shape[axis + 1 :])
        mask_shape = [1] * gathered.dim()
        mask_shape[axis : axis + 2] = list(places.shape)
        if not bool(present.all()):
            gathered = gathered * present.to(gathered.device, gathered.dtype).view(mask_shape)
        axes.append((places.shape[0], places.shape[1]))
    order = [*range(0, 2 * len(axes), 2), *range(1, 2 * len(axes), 2)]
    return gathered.permute(order).reshape(math.prod(count for count, _ in axes), -1)


def _places(label: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """For each label its positions as a padded row, and which of them are there."""
    counts = torch.bincount(label, minlength=size)[:size]
    width = int(counts.max()) if size else 0
    inside = torch.nonzero(label < size).flatten()
    order = inside[torch.argsort(label[inside], stable=True)]
    starts = torch.cumsum(counts, 0) - counts
    column = torch.arange(len(order)) - starts[label[order]]
    places = torch.zeros(size, width, dtype=torch.int64)
    present = torch.zeros(size, width, dtype=torch.bool)
    places[label[order], column] = order
    present[label[order], column] = True
    return places, present
