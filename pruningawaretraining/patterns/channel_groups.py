"""Groups that can be removed from a model, with what depends on them beside the tensors that they index.

Shape suffixes: ``_G`` groups, ``_G1`` groups and one more for "outside".
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from pruningawaretraining.groups.attachment import Attachment, MaskHooks, OwnCost, renumbered
from pruningawaretraining.groups.grouping import Grouping, Member, concat
from pruningawaretraining.registry import calling, check_returned

Found = TypeVar("Found")
HOOKS = "MaskHooks (an object with mask and release) or None"


@dataclass(frozen=True, eq=False)
class _Named:
    """The hooks of an attachment; one of a user's own that raises is named."""

    attachment: Attachment
    hooks: MaskHooks

    def mask(self, keep_G: Tensor, device: torch.device) -> None:
        """See :class:`MaskHooks`."""
        with calling("attachment", self.attachment, "nothing"):
            self.hooks.mask(keep_G, device)

    def release(self) -> None:
        """See :class:`MaskHooks`."""
        with calling("attachment", self.attachment, "nothing"):
            self.hooks.release()


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """Groups of a model that can be removed: coupled channels, heads, residual blocks.

    Args:
        grouping: one group per removable channel, one set per run of coupled layers.
        skipped: layer -> why its channels stay.
        attachments: the parts of the model that depend on the groups beside their tensors, one for each kind.
    """

    grouping: Grouping
    skipped: dict[str, str] = field(default_factory=dict)
    attachments: tuple[Attachment, ...] = ()

    def is_like(self, other: ChannelGroups) -> bool:
        """Whether the sets are the same, and so are the parts of the model that depend on them."""
        mine, theirs = ([(type(one), one.groups.keys()) for one in found.attachments] for found in (self, other))
        return self.grouping.sets == other.grouping.sets and mine == theirs

    def restrict(self, model: nn.Module, keep_G: Tensor) -> ChannelGroups:
        """The groups that are left after the others have been removed from the model."""
        keep_G = keep_G.cpu()
        size = int(keep_G.sum())
        number_G1 = torch.full((self.grouping.size + 1,), -1)
        number_G1[:-1][keep_G], number_G1[-1] = torch.arange(size), size
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        prefixes = self.taken_prefixes(keep_G)
        members = []
        for member in self.grouping.members:
            if member.name.startswith(prefixes):
                continue
            if member.role == "block":
                members.append(_of_block(member, tensors[member.name], number_G1, size))
                continue
            dim = next(index for index, label in enumerate(member.labels) if label is not None)
            assert member.slots is not None
            slots = renumbered(member.slots, number_G1)
            if len(slots) == 0:  # of a module that is gone
                continue
            members.append(Member.along(member.name, tensors[member.name], dim, slots, size, member.role))
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(keep_G.long(), 0)])
        gone = self.taken_out(keep_G)
        sets = tuple(
            replace(
                one,
                start=int(bounds[one.start]),
                stop=int(bounds[one.stop]),
                layers=tuple(name for name in one.layers if name not in gone),
            )
            for one in self.grouping.sets
        )
        grouping = Grouping(self.grouping.name, tuple(members), sets)
        attachments = tuple(one.renumber(number_G1, size) for one in self.outside(keep_G))
        return ChannelGroups(grouping, self.skipped, attachments)

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
        number_G1 = torch.full((self.grouping.size + 1,), grouping.size)
        for number, one in zip(left, grouping.sets, strict=True):
            before = self.grouping.sets[number]
            number_G1[before.start : before.stop] = torch.arange(one.start, one.stop)
        skipped = {self.grouping.sets[number].name: reason for number, reason in reasons.items()}
        coupled = {name: reasons[number] for name, number in self._makers(reasons).items() if name not in skipped}
        skipped = {**self.skipped, **skipped, **coupled}
        return ChannelGroups(grouping, skipped, self._renumbered(number_G1, grouping.size))

    def _makers(self, numbers: Collection[int]) -> dict[str, int]:
        """Layers that make channels of some sets and of no others -> the first of these sets."""
        found: dict[str, int] = {}
        others: set[str] = set()
        for member in self.grouping.of_role("out").members:
            assert member.slots is not None
            slots = member.slots.cpu()
            name = member.name.rpartition(".")[0]
            for number in set(self.grouping.set_ids[slots[slots < self.grouping.size]].tolist()):
                if number in numbers:
                    found.setdefault(name, number)
                else:
                    others.add(name)
        return {name: number for name, number in found.items() if name not in others}

    def beside(self, other: ChannelGroups) -> ChannelGroups:
        """These groups followed by others of the same model."""
        first, both = self.grouping.size, concat([self.grouping, other.grouping], self.grouping.name)
        numbers, outside = torch.arange(both.size), torch.tensor([both.size])
        mine = self._renumbered(torch.cat([numbers[:first], outside]), both.size)
        theirs = other._renumbered(torch.cat([numbers[first:], outside]), both.size)
        return ChannelGroups(both, {**self.skipped, **other.skipped}, (*mine, *theirs))

    def _renumbered(self, number_G1: Tensor, size: int) -> tuple[Attachment, ...]:
        return self._asked("an Attachment", lambda one: one.renumber(number_G1, size))

    def _asked(self, expected: str, ask: Callable[[Attachment], Found]) -> tuple[Found, ...]:
        """The answer of every attachment; one of a user's own that raises is named."""
        answers = []
        for one in self.attachments:
            with calling("attachment", one, expected):
                answers.append(ask(one))
        return tuple(answers)

    # --- attachments --------------------------------------------------------------------------------------------

    def hooks(self, model: nn.Module) -> list[MaskHooks]:
        """Hooks that let the modules of the model, or of a copy, know what is masked; there are none yet on it."""
        found = self._asked(HOOKS, lambda one: one.hooks(model))
        for one, hooks in zip(self.attachments, found, strict=True):
            methods = (getattr(hooks, name, None) for name in ("mask", "release"))
            check_returned(hooks is None or all(map(callable, methods)), "attachment", one, hooks, HOOKS)
        pairs = zip(self.attachments, found, strict=True)
        return [_Named(one, hooks) for one, hooks in pairs if hooks is not None]

    def taken_out(self, keep_G: Tensor) -> set[str]:
        """Modules that leave the model as a whole."""
        return set().union(*self._asked("names of modules", lambda one: set(one.taken_out(keep_G))))

    def taken_prefixes(self, keep_G: Tensor) -> tuple[str, ...]:
        """Prefixes of the names of everything in modules that leave the model as a whole."""
        return tuple(f"{name}." for name in self.taken_out(keep_G))

    def outside(self, keep_G: Tensor) -> list[Attachment]:
        """The attachments without parts in modules that leave the model as a whole."""
        prefixes = self.taken_prefixes(keep_G)
        return [
            replace(one, groups={name: groups for name, groups in one.groups.items() if not name.startswith(prefixes)})
            for one in self.attachments
        ]

    def costs(self) -> list[OwnCost]:
        """Costs of modules beside the layers that the groups index."""
        return [cost for costs in self._asked("a list of OwnCost", lambda one: list(one.costs())) for cost in costs]


def _of_block(member: Member, tensor: Tensor, number_G1: Tensor, size: int) -> Member:
    """A member that is one group as a whole, whatever is left of its rows."""
    assert member.slots is not None
    group = number_G1[member.slots[0]]
    return Member.along(member.name, tensor, 0, group.expand(len(tensor)).clone(), size, "block")
