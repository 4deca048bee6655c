"""Rules inside the same layers: what the masks of the others mean for one of them, and the masks of all together.

Shape suffixes: ``_G`` groups of one rule, ``_S`` slots of one member, ``_W`` any weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pruningawaretraining.engine.weight_rules import WeightRule
from pruningawaretraining.groups.grouping import Member
from pruningawaretraining.groups.views import slot_maxima


def with_others(one: WeightRule, rules: Sequence[WeightRule]) -> Tensor:
    """A rule's masks, and of its other groups those that other rules mask as a whole, where masks are nested.

    Args:
        one: the rule.
        rules: all that may prune the same weights.
    """
    names = _names(one)
    others = [each for each in rules if each is not one and each.masks.active and names & _names(each)]
    if not others or not one.dynamic.nested:
        return one.masks.keep_G
    kept = _kept_weights(others, names)
    keep_S = [
        _any_kept(member, kept[member.name]) if member.name in kept else torch.ones(member.n_slots, dtype=torch.bool)
        for member in one.grouping.members
    ]
    return one.masks.keep_G & torch.cat([each.to(one.masks.keep_G.device) for each in keep_S])


def counts(rules: Sequence[WeightRule]) -> tuple[int, int]:
    """(groups, those that are masked); entries of a weight that several rules prune are groups of their own."""
    if together := _joint(rules):
        rows = _tallies(rules, together)
        return sum(size for _, size, _ in rows), sum(size - kept for _, size, kept in rows)
    total = sum(one.grouping.size for one in rules)
    return total, total - sum(sum(one.masks.kept_by_set) for one in rules)


def masked_weights(rules: Sequence[WeightRule]) -> int:
    """How many weights are masked by any of the rules."""
    if not _shared(rules):
        return sum(one.masks.masked_weights() for one in rules)
    kept = _kept_weights(rules, {name for one in rules for name in _names(one)})
    return sum(kept_W.numel() - int(kept_W.sum()) for kept_W in kept.values())


def described(rules: Sequence[WeightRule]) -> list[dict[str, Any]]:
    """One dict for each weight: source, dependencies (none), size and kept groups."""
    return [
        {"source": name, "dependencies": [], "size": size, "kept": kept}
        for name, size, kept in _tallies(rules, _joint(rules))
    ]


def keep_masks(rules: Sequence[WeightRule]) -> dict[str, Tensor]:
    """Name of each weight -> keep mask of its groups, or of its entries where several rules prune it, on the CPU."""
    own = {name: keep_S for one in rules for name, keep_S in one.masks.by_parameter().items()}
    return own | {name: kept_W.flatten().cpu() for name, kept_W in _joint(rules).items()}


def _tallies(rules: Sequence[WeightRule], together: Mapping[str, Tensor]) -> list[tuple[str, int, int]]:
    """(name, groups, those that are kept) of every weight; ``together`` as :func:`_joint` gives it."""
    own = [
        (member.name, member.n_slots, left)
        for one in rules
        for member, left in zip(one.grouping.members, one.masks.kept_of_members(), strict=True)
        if member.name not in together
    ]
    return own + [(name, kept_W.numel(), int(kept_W.sum())) for name, kept_W in together.items()]


def _joint(rules: Sequence[WeightRule]) -> dict[str, Tensor]:
    """Name of each weight that several rules prune -> True for its entries that none of them masks."""
    shared = _shared(rules)
    return _kept_weights(rules, shared) if shared else {}


def _shared(rules: Sequence[WeightRule]) -> set[str]:
    """Names of the weights that several rules prune."""
    owners = Counter(name for one in rules for name in _names(one))
    return {name for name, count in owners.items() if count > 1}


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
