"""Rules inside the same layers: what the masks of the others mean for one of them, and the masks of all together.

Shape suffixes: ``_G`` groups of one rule, ``_S`` slots of one member, ``_W`` any weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pruningawaretraining.engine.weight_rules import WeightRule
from pruningawaretraining.groups.grouping import Member
from pruningawaretraining.groups.views import slot_maxima


def with_others(one: WeightRule, rules: Sequence[WeightRule]) -> Tensor:
    """A rule's masks, and of its other groups those whose every weight is masked by other rules."""
    names = _names(one)
    others = [other for other in rules if other is not one and other.masks.active and names & _names(other)]
    if not others:
        return one.masks.keep_G
    kept = _kept_weights(others, names)
    keep_S = [
        _any_kept(member, kept[member.name]) if member.name in kept else torch.ones(member.n_slots, dtype=torch.bool)
        for member in one.grouping.members
    ]
    return one.masks.keep_G & torch.cat([each.to(one.masks.keep_G.device) for each in keep_S])


def counts(rules: Sequence[WeightRule]) -> tuple[int, int]:
    """(groups, those that are masked); a weight of several rules counts once, in the groups of the first."""
    if _joint(rules):
        sizes = [(member.n_slots, kept) for member, kept in _tallies(rules)]
        return sum(size for size, _ in sizes), sum(size - kept for size, kept in sizes)
    total = sum(one.grouping.size for one in rules)
    return total, total - sum(sum(one.masks.kept_by_set) for one in rules)


def described(rules: Sequence[WeightRule]) -> list[dict[str, Any]]:
    """One dict for each weight: source, dependencies (none), size and kept groups."""
    rows = [(member.name, member.n_slots, kept) for member, kept in _tallies(rules)]
    return [{"source": name, "dependencies": [], "size": size, "kept": kept} for name, size, kept in rows]


def keep_masks(rules: Sequence[WeightRule]) -> dict[str, Tensor]:
    """Name of each weight -> keep mask of its groups, on the CPU."""
    own = {name: keep_S for one in rules for name, keep_S in one.masks.by_parameter().items()}
    return own | {name: keep_S.cpu() for name, keep_S in _joint(rules).items()}


def _tallies(rules: Sequence[WeightRule]) -> Iterator[tuple[Member, int]]:
    """Every weight with how many of its groups are kept."""
    together, seen = _joint(rules), set()
    for one in rules:
        for member, left in zip(one.grouping.members, one.masks.kept_of_members(), strict=True):
            if member.name not in together:
                yield member, left
            elif member.name not in seen:
                seen.add(member.name)
                yield member, int(together[member.name].sum())


def _joint(rules: Sequence[WeightRule]) -> dict[str, Tensor]:
    """Name of each weight that several rules prune -> keep mask of the first one's groups under the masks of all."""
    owners = Counter(name for one in rules for name in _names(one))
    shared = {name for name, count in owners.items() if count > 1}
    kept = _kept_weights(rules, shared) if shared else {}
    members: dict[str, Member] = {}
    for one in rules:
        members |= {each.name: each for each in one.grouping.members if each.name not in members}
    return {name: _any_kept(members[name], kept_W) for name, kept_W in kept.items()}


def _names(one: WeightRule) -> set[str]:
    return {member.name for member in one.grouping.members}


def _kept_weights(rules: Sequence[WeightRule], names: Collection[str]) -> dict[str, Tensor]:
    """Name of a weight -> True for its entries that no rule masks."""
    kept: dict[str, Tensor] = {}
    for one in rules:
        for member, keep_W in one.grouping.expand(one.masks.keep_G, outside=True):
            if member.name in names:
                whole_W = keep_W.expand(member.parameter.shape)
                kept[member.name] = kept[member.name] & whole_W if member.name in kept else whole_W
    return kept


def _any_kept(member: Member, kept_W: Tensor) -> Tensor:
    """True for slots of which any entry is kept."""
    return slot_maxima(member, kept_W.float()) > 0
