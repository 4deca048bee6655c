"""Masks of slices, blocks, N:M and single weights: one byte a group, applied through views of the weights.

Shape suffixes: ``_G`` groups, ``_S`` slots of one member, ``_W`` any weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.criteria.reductions import device_of
from pruningawaretraining.folding import fill_groups, slot_counts, slots_of
from pruningawaretraining.grouping import Grouping, Member
from pruningawaretraining.optimizer_state import mask_state
from pruningawaretraining.sharded import is_sharded, local_member, local_of


class ElementMasks:
    """Holds and applies the masks of one grouping whose members have consecutive slots.

    Args:
        grouping: its groups.
    """

    def __init__(self, grouping: Grouping) -> None:
        self.grouping = grouping
        self.keep_G = torch.ones(grouping.size, dtype=torch.bool, device=device_of(grouping))
        self._drops: list[tuple[Member, Tensor]] = []  # members with anything masked, and which of their slots
        self._handles: list[RemovableHandle] = []

    @property
    def active(self) -> bool:
        """Whether anything is masked."""
        return bool(self._drops)

    def set(self, keep_G: Tensor) -> None:
        """Take new masks (True = keep) and zero what they switch off."""
        self.clear()
        self.keep_G = keep_G.detach().to(device_of(self.grouping), torch.bool).clone()
        for member in self.grouping.members:
            drop_S = ~slots_of(self.grouping, member, self.keep_G)
            if bool(drop_S.any()):
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
        for handle in self._handles:
            handle.remove()
        self._handles, self._drops = [], []
        self.keep_G = torch.ones_like(self.keep_G)

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
        fill_groups(here, local_of(values_W), drop_S, 0.0)

    def masked_weights(self) -> int:
        """How many weights are masked."""
        total = 0
        for member, drop_S in self._drops:
            counts = slot_counts(member).to(drop_S.device)
            gone = drop_S.count_nonzero() if counts.numel() == 1 else drop_S.view(member.sizes).double()
            total += round(float((gone * counts).sum()))
        return total

    def by_parameter(self) -> dict[str, Tensor]:
        """Name of each weight -> keep mask of its groups, on the CPU."""
        return {
            member.name: slots_of(self.grouping, member, self.keep_G).detach().cpu().clone()
            for member in self.grouping.members
        }
