"""Masks of slices, blocks, N:M and single weights: one byte a group, applied through views of the weights.

Shape suffixes: ``_G`` groups, ``_S`` slots of one member, ``_W`` any weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.distributed.fsdp import is_sharded, local_member, local_of
from pruningawaretraining.groups.grouping import Grouping, Member
from pruningawaretraining.groups.lowest import counts_of
from pruningawaretraining.groups.reductions import device_of
from pruningawaretraining.groups.views import fill_groups, fold_of, slot_counts, slots_of
from pruningawaretraining.models.optimizer_state import mask_state


class ElementMasks:
    """Holds and applies the masks of one grouping whose members have consecutive slots.

    Args:
        grouping: its groups.
    """

    def __init__(self, grouping: Grouping) -> None:
        self.grouping = grouping
        self._keep_G = torch.ones(grouping.size, dtype=torch.bool, device=device_of(grouping))
        self.kept_by_set = [one.size for one in grouping.sets]  # groups of each set that are not masked
        self._drops: list[tuple[Member, Tensor]] = []  # members with anything masked, and which of their slots
        self._entries: dict[tuple[int, bool], Tensor] = {}  # the same entry by entry, where labels are irregular
        self._handles: list[RemovableHandle] = []

    @property
    def keep_G(self) -> Tensor:
        """For each group, whether it is kept; on the device of the first weight."""
        device = device_of(self.grouping)
        if self._keep_G.device != device:
            self._keep_G = self._keep_G.to(device)
        return self._keep_G

    @property
    def active(self) -> bool:
        """Whether anything is masked."""
        return bool(self._drops)

    def set(self, keep_G: Tensor) -> None:
        """Take new masks (True = keep) and zero what they switch off."""
        self._forget()
        self._keep_G = keep_G.detach().to(device_of(self.grouping), torch.bool, copy=True)
        self.kept_by_set = counts_of(self.keep_G, [one.size for one in self.grouping.sets])
        for member, kept in zip(self.grouping.members, self.kept_of_members(), strict=True):
            if kept < member.n_slots:
                drop_S = ~slots_of(self.grouping, member, self.keep_G)
                self._drops.append((member, drop_S.to(member.parameter.device)))
        for index, (member, _) in enumerate(self._drops):
            if member.parameter.requires_grad:
                hook = partial(self._mask_gradient, index=index)
                handle = member.parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                self._handles.append(handle)
        self.apply()

    def on(self, grouping: Grouping) -> ElementMasks:
        """The same masks on the same groups of other tensors."""
        other, keep_G, active = ElementMasks(grouping), self.keep_G, self.active
        self.clear()
        if active:
            other.set(keep_G)
        return other

    def clear(self) -> None:
        """Forget the masks; the weights stay as they are."""
        self._forget()
        self._keep_G = torch.ones_like(self._keep_G)

    def _forget(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._drops, self._entries = [], [], {}
        self.kept_by_set = [one.size for one in self.grouping.sets]

    def kept_of_members(self) -> list[int]:
        """Groups of each member that are not masked; most often each member is a set."""
        runs = [(member.offset, member.n_slots) for member in self.grouping.members]
        if runs == [(one.start, one.size) for one in self.grouping.sets]:
            return self.kept_by_set
        return [counts_of(self.keep_G[start : start + size], [size])[0] for start, size in runs]

    @torch.no_grad()
    def apply(self) -> None:
        """Set masked weights to exactly 0."""
        for index, (member, _) in enumerate(self._drops):
            self._fill(index, member.parameter)

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """Set the gradients of masked weights to 0, so that they enter no norm and no moving average."""
        for index, (member, _) in enumerate(self._drops):
            self._mask_gradient(member.parameter, index)

    @torch.no_grad()
    def apply_to_state(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Set the optimizers' state of masked weights (momenta, averages) to 0."""
        known = list(optimizers)
        if not known:
            return
        for index, (member, _) in enumerate(self._drops):
            keep_W = torch.ones_like(local_of(member.parameter), dtype=torch.bool)
            self._fill(index, keep_W, is_sharded(member.parameter))
            mask_state(known, [member.parameter], [keep_W])

    @torch.no_grad()
    def _mask_gradient(self, parameter: Tensor, index: int) -> None:
        if parameter.grad is not None and parameter.grad.layout is torch.strided:
            self._fill(index, parameter.grad)

    def _fill(self, index: int, values_W: Tensor, part: bool = False) -> None:
        """Write 0 over the masked entries; the masks follow a model that has been moved to another device.

        Args:
            index: of the member.
            values_W: shaped like it; a DTensor's local part is written, or what is said to be that ``part``.
        """
        member, drop_S = self._drops[index]
        if drop_S.device != values_W.device:
            drop_S = drop_S.to(values_W.device)
            self._drops[index] = member, drop_S
        here = local_member(member) if part or is_sharded(values_W) else member
        if fold_of(here) is not None:
            fill_groups(here, local_of(values_W), drop_S, 0.0)
            return
        known = self._entries.get((index, here is member))
        if known is None or known.device != values_W.device:
            known = self._entries[index, here is member] = here.spread(drop_S, outside=0.0).bool()
        local_of(values_W).masked_fill_(known, 0.0)

    def masked_weights(self) -> int:
        """How many weights are masked."""
        total, kept = 0, dict(zip(self.grouping.members, self.kept_of_members(), strict=True))
        for member, drop_S in self._drops:
            counts = slot_counts(member)
            if counts.numel() == 1:
                total += (member.n_slots - kept[member]) * int(counts)
                continue
            alike = [dim for dim, length in enumerate(counts.shape) if length == 1]
            gone = drop_S.view(member.sizes)
            gone = gone.sum(dim=alike, keepdim=True) if alike else gone.long()
            total += int((gone * counts.to(gone)).sum())
        return total

    def by_parameter(self) -> dict[str, Tensor]:
        """Name of each weight -> keep mask of its groups, on the CPU."""
        return {
            member.name: slots_of(self.grouping, member, self.keep_G).detach().cpu().clone()
            for member in self.grouping.members
        }
