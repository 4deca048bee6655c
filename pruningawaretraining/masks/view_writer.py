"""Masks of slices, blocks, N:M and single weights: one byte a group, written through views of the weights.

Shape suffixes: ``_G`` groups, ``_S`` slots of one member, ``_W`` any weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pruningawaretraining.distributed.fsdp import is_sharded, local_member, local_of
from pruningawaretraining.groups import kernels as fused
from pruningawaretraining.groups.grouping import Grouping, Member
from pruningawaretraining.groups.reductions import device_of
from pruningawaretraining.groups.views import Fold, fold_of, slot_counts, slots_of
from pruningawaretraining.masks.restoring import restored


class ViewWriter:
    """Writes zeros over the chosen slots of members that have consecutive slots.

    Args:
        grouping: the groups.
    """

    def __init__(self, grouping: Grouping) -> None:
        self.grouping = grouping
        self._drops: list[tuple[Member, Tensor]] = []  # members with anything masked, and which of their slots
        self._gone: list[int] = []  # how many of their slots are masked
        self._of: dict[int, list[int]] = {}  # indices of these by the id of the parameter
        self._entries: dict[tuple[int, bool], Tensor] = {}  # the same entry by entry, where labels are irregular

    @property
    def device(self) -> torch.device:
        """Masks lie where the first weight does."""
        return device_of(self.grouping)

    def build(self, keep_G: Tensor, kept_by_set: list[int]) -> None:
        """See :class:`~pruningawaretraining.masks.masks.Writer`."""
        self._drops, self._gone, self._entries, self._of = [], [], {}, {}
        kept = kept_of_members(self.grouping, keep_G, kept_by_set)
        for member, left in zip(self.grouping.members, kept, strict=True):
            if left < member.n_slots:
                self._of.setdefault(id(member.parameter), []).append(len(self._drops))
                drop_S = ~slots_of(self.grouping, member, keep_G)
                self._drops.append((member, drop_S.to(member.parameter.device)))
                self._gone.append(member.n_slots - left)

    def parameters(self) -> list[Tensor]:
        """See :class:`~pruningawaretraining.masks.masks.Writer`."""
        return list({id(member.parameter): member.parameter for member, _ in self._drops}.values())

    def clear_weights(self, only: set[int] | None = None) -> None:
        """See :class:`~pruningawaretraining.masks.masks.Writer`."""
        for index, (member, _) in enumerate(self._drops):
            if only is None or id(member.parameter) in only:
                self._fill(index, member.parameter)

    def restore(self) -> dict[int, int]:
        """See :class:`~pruningawaretraining.masks.masks.Writer`."""
        folds = [None if is_sharded(member.parameter) else fold_of(member) for member, _ in self._drops]
        if not all(
            fold is not None and compiled(fold, member.parameter.detach(), drop_S)
            for fold, (member, drop_S) in zip(folds, self._drops, strict=True)
        ):
            return restored(self.factors)
        found: dict[int, int] = {}
        for index, (member, _) in enumerate(self._drops):
            if count := self._fill(index, member.parameter):
                found[id(member.parameter)] = found.get(id(member.parameter), 0) + count
        return found

    def clear_gradients(self, only: set[int] | None = None) -> None:
        """See :class:`~pruningawaretraining.masks.masks.Writer`."""
        for index, (member, _) in enumerate(self._drops):
            if only is None or id(member.parameter) in only:
                self._fill_gradient(index, member.parameter)

    def accumulated(self, parameter: Tensor) -> None:
        """See :class:`~pruningawaretraining.masks.masks.Writer`."""
        for index in self._of.get(id(parameter), ()):
            self._fill_gradient(index, parameter)

    def settle(self) -> None:
        """Nothing is left for later here."""

    def factors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """See :class:`~pruningawaretraining.masks.masks.Writer`; one mask of a whole weight at a time is held."""
        for index, (member, _) in enumerate(self._drops):
            keep_W = torch.ones_like(local_of(member.parameter), dtype=torch.bool)  # so are entries in no group
            part = is_sharded(member.parameter)
            if (fold := fold_of(local_member(member) if part else member)) is None:
                self._fill(index, keep_W, part)
            else:  # much faster than filling through a mask
                fold.view(keep_W).copy_((~self._drop_on(index, keep_W.device)).view(fold.spread_shape))
            yield member.parameter, keep_W

    def _fill_gradient(self, index: int, parameter: Tensor) -> None:
        if parameter.grad is not None and parameter.grad.layout is torch.strided:
            self._fill(index, parameter.grad)

    def _fill(self, index: int, values_W: Tensor, part: bool = False) -> int:
        """Write 0 over the masked entries; the masks follow a model that has been moved to another device.

        Returns: see :func:`clear_slots`.

        Args:
            index: of the member.
            values_W: shaped like it; a DTensor's local part is written, or what is said to be that ``part``.
        """
        member, drop_S = self._drops[index][0], self._drop_on(index, values_W.device)
        here = local_member(member) if part or is_sharded(values_W) else member
        if (fold := fold_of(here)) is not None:
            return clear_slots(fold, local_of(values_W), drop_S)
        known = self._entries.get((index, here is member))
        if known is None or known.device != values_W.device:
            known = self._entries[index, here is member] = here.spread(drop_S, outside=0.0).bool()
        local_of(values_W).masked_fill_(known, 0.0)
        return 0

    def _drop_on(self, index: int, device: torch.device) -> Tensor:
        member, drop_S = self._drops[index]
        if drop_S.device != device:
            drop_S = drop_S.to(device)
            self._drops[index] = member, drop_S
        return drop_S

    def masked_weights(self) -> int:
        """See :class:`~pruningawaretraining.masks.masks.Writer`."""
        total = 0
        for (member, drop_S), gone_slots in zip(self._drops, self._gone, strict=True):
            counts = slot_counts(member)
            if counts.numel() == 1:
                total += gone_slots * int(counts)
                continue
            alike = [dim for dim, length in enumerate(counts.shape) if length == 1]
            gone = drop_S.view(member.sizes)
            gone = gone.sum(dim=alike, keepdim=True) if alike else gone.long()
            total += int((gone * counts.to(gone)).sum())
        return total


def compiled(fold: Fold, values_W: Tensor, drop_S: Tensor) -> fused.Kernels | None:
    """The compiled passes, where one can clear the chosen slots."""
    fits = fold.flat is not None and drop_S.is_contiguous() and fused.fits(fold.view(values_W))
    return fused.kernels() if fits else None


def clear_slots(fold: Fold, values_W: Tensor, drop_S: Tensor) -> int:
    """Write 0 in place over every entry of the chosen slots (bool): in one compiled pass where it fits.

    Returns: how many were not 0 before, by a compiled pass; else 0, as to count takes longer.
    """
    kernels, view_F = compiled(fold, values_W, drop_S), fold.view(values_W)
    if kernels is None or fold.flat is None:
        view_F.masked_fill_(drop_S.view(fold.spread_shape), 0.0)
        return 0
    across, inside, along = fold.flat
    drop_PQ = drop_S.view(torch.uint8).view(across, along)
    return int(kernels.clear_chosen(view_F.view(across, inside, along).numpy(), drop_PQ.numpy()))


def kept_of_members(grouping: Grouping, keep_G: Tensor, kept_by_set: list[int]) -> list[int]:
    """How many groups of each member with consecutive slots are kept; counted, by one wait, unless each is a set."""
    runs = [(member.offset, member.n_slots) for member in grouping.members]
    if runs == [(one.start, one.size) for one in grouping.sets]:
        return kept_by_set
    counts = [keep_G[start : start + size].count_nonzero() for start, size in runs]
    found: list[int] = torch.stack(counts).tolist() if counts else []
    return found
