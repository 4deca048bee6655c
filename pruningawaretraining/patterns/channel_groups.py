"""Groups of coupled channels, with the norms, heads and blocks that they touch.

Shape suffixes: ``_G`` groups, ``_G1`` groups and one more for "outside", ``_H`` heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pruningawaretraining.groups.grouping import Grouping, Member, concat
from pruningawaretraining.models.skipped_blocks import Block
from pruningawaretraining.patterns.head import Heads


@dataclass(frozen=True, eq=False)
class Width:
    """An attribute of a module that says how many channels there are.

    Args:
        module, attribute: its place.
        groups_C: the groups of the channels that it counts.
    """

    module: str
    attribute: str
    groups_C: Tensor


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """Groups of coupled channels of a model.

    Args:
        grouping: one group per removable channel, one set per run of coupled layers.
        skipped: layer -> why its channels stay.
        norms: norm layer -> the group of each of its channels (``grouping.size`` for channels outside every group).
        heads: attention block -> its heads, where they are groups too.
        blocks: residual block -> its group, where whole blocks are groups.
        widths: attributes of modules that count channels.
    """

    grouping: Grouping
    skipped: dict[str, str] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Heads] = field(default_factory=dict)
    blocks: dict[str, Block] = field(default_factory=dict)
    widths: tuple[Width, ...] = ()

    def restrict(self, model: nn.Module, keep_G: Tensor) -> ChannelGroups:
        """The groups that are left after the others have been removed from the model."""
        keep_G = keep_G.cpu()
        size = int(keep_G.sum())
        renumbered = torch.full((self.grouping.size + 1,), size, dtype=torch.int64)
        renumbered[:-1][keep_G] = torch.arange(size)
        alive_G1 = torch.cat([keep_G, torch.ones(1, dtype=torch.bool)])
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        members = []
        for member in self.grouping.members:
            dim = next(index for index, label in enumerate(member.labels) if label is not None)
            slots = _restricted(member.slots, alive_G1, renumbered)
            if len(slots) == 0:  # of a block that is gone
                continue
            members.append(Member.along(member.name, tensors[member.name], dim, slots, size, member.role))
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(keep_G.long(), 0)])
        sets = tuple(
            replace(one, start=int(bounds[one.start]), stop=int(bounds[one.stop])) for one in self.grouping.sets
        )
        norms = {name: _restricted(groups, alive_G1, renumbered) for name, groups in self.norms.items()}
        heads = {
            name: replace(one, groups_H=_restricted(one.groups_H, alive_G1, renumbered))
            for name, one in self.heads.items()
        }
        blocks = {
            name: replace(one, group=int(renumbered[one.group]))
            for name, one in self.blocks.items()
            if keep_G[one.group]
        }
        if blocks:  # the layers of a set of blocks are its groups
            sets = tuple(replace(one, layers=tuple(name for name in one.layers if name in blocks)) for one in sets)
        widths = tuple(replace(one, groups_C=_restricted(one.groups_C, alive_G1, renumbered)) for one in self.widths)
        grouping = Grouping(self.grouping.name, tuple(members), sets)
        return ChannelGroups(grouping, self.skipped, norms, heads, blocks, widths)

    def on(self, copy: nn.Module) -> ChannelGroups:
        """The same groups on the tensors of a copy of the model."""
        return self.restrict(copy, torch.ones(self.grouping.size, dtype=torch.bool))

    def without(self, reasons: dict[int, str]) -> ChannelGroups:
        """The same without some sets, whose channels all stay.

        Args:
            reasons: number of a set -> why.
        """
        left = [number for number in range(len(self.grouping.sets)) if number not in reasons]
        grouping = self.grouping.select_sets(left)
        renumbered = torch.full((self.grouping.size + 1,), grouping.size, dtype=torch.int64)
        for number, one in zip(left, grouping.sets, strict=True):
            before = self.grouping.sets[number]
            renumbered[before.start : before.stop] = torch.arange(one.start, one.stop)
        norms = {name: renumbered[groups.cpu()] for name, groups in self.norms.items()}
        norms = {name: groups for name, groups in norms.items() if bool((groups < grouping.size).any())}
        heads = {name: replace(one, groups_H=renumbered[one.groups_H.cpu()]) for name, one in self.heads.items()}
        heads = {name: one for name, one in heads.items() if bool((one.groups_H < grouping.size).any())}
        blocks = {name: replace(one, group=int(renumbered[one.group])) for name, one in self.blocks.items()}
        blocks = {name: one for name, one in blocks.items() if one.group < grouping.size}
        skipped = {self.grouping.sets[number].name: reason for number, reason in reasons.items()}
        widths = tuple(replace(one, groups_C=renumbered[one.groups_C]) for one in self.widths)
        widths = tuple(one for one in widths if bool((one.groups_C < grouping.size).any()))
        return ChannelGroups(grouping, {**self.skipped, **skipped}, norms, heads, blocks, widths)

    def beside(self, grouping: Grouping, heads: dict[str, Heads], skipped: dict[str, str]) -> ChannelGroups:
        """These groups followed by heads."""
        first, both = self.grouping.size, concat([self.grouping, grouping], self.grouping.name)
        norms = {name: torch.where(groups >= first, both.size, groups) for name, groups in self.norms.items()}
        moved = {name: replace(one, groups_H=one.groups_H + first) for name, one in heads.items()}
        widths = tuple(
            replace(one, groups_C=torch.where(one.groups_C >= first, both.size, one.groups_C)) for one in self.widths
        )
        heads = {**self.heads, **moved}
        return ChannelGroups(both, {**self.skipped, **skipped}, norms, heads, self.blocks, widths)


def _restricted(groups: Tensor | None, alive_G1: Tensor, renumbered_G1: Tensor) -> Tensor:
    """The groups that are left, renumbered, along the one dimension that they have."""
    assert groups is not None
    groups = groups.cpu()
    return renumbered_G1[groups[alive_G1[groups]]].reshape(-1, *groups.shape[1:])
