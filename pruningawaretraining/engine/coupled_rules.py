"""Rules of coupled groups: each with its share of the model's groups.

Shape suffixes: ``_D`` groups of the dense model, ``_G`` groups of one rule that are still there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.allocation.ranking import limits_of
from pruningawaretraining.config.schema import Rule
from pruningawaretraining.costs.macs import LinearCost
from pruningawaretraining.criteria.base import measures
from pruningawaretraining.criteria.second_order import Calibration
from pruningawaretraining.engine.rule import ActiveRule
from pruningawaretraining.errors import ConfigError, unknown
from pruningawaretraining.groups.grouping import Grouping, GroupSet, Member
from pruningawaretraining.masks.dynamics import FROZEN, Dynamic
from pruningawaretraining.schedules import PRESENT


@dataclass(eq=False)
class CoupledRule(ActiveRule):
    """A rule with its share of the model's groups.

    Args:
        sets: numbers of its sets.
        groups_D: its groups, as indices of the dense model's groups.
        grouping: the same groups alone (without members), renumbered.
        inside: number of a set of the model that lies in a residual block -> that block's.
    """

    sets: list[int]
    groups_D: Tensor
    grouping: Grouping
    inside: dict[int, int] = field(default_factory=dict)


class LiveCost:
    """The dense model's cost seen from one rule's live groups, for criteria."""

    def __init__(self, cost: LinearCost, keep_D: Tensor, groups_D: Tensor) -> None:
        self.names, self.base_L = cost.names, cost.base_L
        self._cost, self._keep_D, self._groups_D = cost, keep_D, groups_D

    def _whole(self, keep_G: Tensor) -> Tensor:
        whole_D = self._keep_D.clone()
        whole_D[self._groups_D] = keep_G
        return whole_D

    def __call__(self, keep_G: Tensor) -> float:
        return self._cost(self._whole(keep_G))

    def saving_G(self, keep_G: Tensor) -> Tensor:
        return self._cost.saving_G(self._whole(keep_G))[self._groups_D]


def assign(
    grouping: Grouping, rules: Sequence[tuple[str, Rule, Any, Any, set[str]]], inside: dict[int, int]
) -> list[CoupledRule]:
    """Give every set to the rule that selects its source layer.

    Args:
        grouping: the model's groups.
        rules: key, rule, built pattern, built criterion and layers of each.
        inside: number of a set that lies in a residual block -> that block's.

    Raises:
        ConfigError: two rules select one set.
    """
    owner: dict[int, str] = {}
    assigned = []
    for key, rule, pattern, criterion, layers in rules:
        numbers = [number for number, one in enumerate(grouping.sets) if one.name in layers]
        for number in numbers:
            if number in owner:
                raise ConfigError(
                    f"{key}.layers: {grouping.sets[number].name!r} is pruned by {owner[number]} already; "
                    "give the rules layers that do not overlap"
                )
            owner[number] = key
        if not numbers:
            raise ConfigError(f"{key}.layers: no prunable channel group among the layers that it selects")
        groups_D, own = _share(grouping, numbers)
        assigned.append(CoupledRule(key, rule, pattern, criterion, numbers, groups_D, own, inside))
    return assigned


def _share(grouping: Grouping, numbers: list[int]) -> tuple[Tensor, Grouping]:
    """The groups of some sets: as indices of all groups, and alone."""
    sets: list[GroupSet] = []
    start = 0
    for number in numbers:
        one = grouping.sets[number]
        sets.append(replace(one, start=start, stop=start + one.size))
        start += one.size
    groups_D = torch.cat([torch.arange(grouping.sets[number].start, grouping.sets[number].stop) for number in numbers])
    return groups_D, Grouping(grouping.name, (), tuple(sets))


def common_dynamic(rules: Sequence[CoupledRule]) -> Dynamic:
    """The dynamic of all rules of coupled groups, which share their masks.

    Raises:
        ConfigError: two rules have different ones.
    """
    for one in rules[1:]:
        if one.dynamic != rules[0].dynamic:
            raise ConfigError(
                f"{one.key}.dynamic: {one.rule.dynamic!r} is another than that of {rules[0].key}, and coupled groups "
                f"share their masks. Allowed: {rules[0].rule.dynamic!r}"
            )
    return rules[0].dynamic if rules else FROZEN


def started_from(one: CoupledRule, keep_D: Tensor, live_D: Tensor) -> Tensor:
    """The masks that an event starts from: without those of its own rule that may be lifted again.

    Args:
        one: the rule.
        keep_D: masks of the dense model's groups.
        live_D: numbers of the groups that are still there.
    """
    if one.dynamic.nested:
        return keep_D
    taken_D = keep_D.clone()
    taken_D[one.groups_D] = torch.isin(one.groups_D, live_D)
    return taken_D


def norms_of_sets(grouping: Grouping) -> dict[str, Tensor]:
    """L2 norms of the groups by set, over output and input weights and norm weights, on the CPU."""
    weights = grouping.of_role("out", "in", "norm", "made", "read", "block")
    norms_G = weights.reduce_of(lambda weight: weight.float().square()).sqrt().cpu()
    return {one.name: norms_G[one.start : one.stop] for one in grouping.sets}


STATES = ("weight_hh_l0", "weight_hh")
"""Weights of recurrent layers and cells with an input for each hidden channel."""


def set_of_layer(grouping: Grouping) -> dict[str, str]:
    """Layer -> the set that its output channels belong to."""
    found: dict[str, str] = {}
    for member in grouping.of_role("out", "made").members:
        if (number := _set_number(grouping, member)) is not None:
            found[member.name.removesuffix(".weight")] = grouping.sets[number].name
    for layer, member in hidden_states(grouping).items():
        if (number := _set_number(grouping, member)) is not None:
            found[layer] = grouping.sets[number].name
    return found


def _set_number(grouping: Grouping, member: Member) -> int | None:
    """The set of the first group that a tensor has entries of; None if it has entries of none."""
    if member.slots is None or not bool((member.slots < grouping.size).any()):
        return None
    return int(grouping.set_ids[int(member.slots.min())])


def hidden_states(grouping: Grouping) -> dict[str, Member]:
    """Recurrent layer -> the tensor that reads its states, along these: the groups of its hidden channels."""
    found: dict[str, Member] = {}
    for member in grouping.members:
        owner, _, attribute = member.name.rpartition(".")
        reads = attribute in STATES and len(member.labels) == 2 and member.labels[1] is not None
        if reads and _set_number(grouping, member) is not None:
            found[owner] = member
    return found


def check_caps(one: CoupledRule, model: nn.Module) -> None:
    """Refuse caps of layers that the model does not have, and caps none of which is of this rule's sets.

    Raises:
        ConfigError: it names the layer, and the nearest of the rule's.
    """
    caps, modules = limits_of(one.rule).caps, dict(model.named_modules())
    own = [each.name for each in one.grouping.sets]
    strange = next((name for name in caps if name not in modules), None)
    if strange is None and caps and not set(caps) & set(own):
        strange = next(iter(caps))
    if strange is not None:
        raise ConfigError(unknown(f"{one.key}.max_sparsity_from", strange, own))


def check_data(one: CoupledRule, calibration: Calibration | None) -> None:
    """Refuse a compensation without data at the first event to come, and not only at the event itself.

    Raises:
        ConfigError: it names the rule.
    """
    if not one.works or not one.compensates or calibration is not None:
        return
    if one.rule.at_init and one.rule.start <= 0:
        raise ConfigError(
            f"{one.key}.at_init: True prunes when the pruner is made, before it has the data that "
            f"compensation: {one.rule.compensation!r} needs. Allowed: False, or start: 1 or later"
        )
    raise ConfigError(
        f"{one.key}.compensation: {one.rule.compensation!r} needs data, and none was given. Allowed: "
        "pruner.calibrate_with(dataloader, loss_fn) before the first prune(); or 'none'"
    )


def check_sharded(one: CoupledRule, calibration: Calibration | None) -> None:
    """Refuse rules that need whole layers, once ``fully_shard`` has spread them.

    Raises:
        ConfigError: it names the option.
    """
    if one.rule.application == "remove":
        raise ConfigError(f"{one.key}.application: 'remove' at every event cannot follow fully_shard. Allowed: mask")
    for name, values in one.given.target.lists.items():
        raise ConfigError(
            f"{one.key}.target.{name}: {values} removes channels at every member, and fully_shard has spread the "
            "parameters. Allowed: one number, or DistributedDataParallel"
        )
    if one.compensates:
        raise ConfigError(
            f"{one.key}.compensation: {one.rule.compensation!r} needs whole layers, and fully_shard has spread "
            "them. Allowed: 'none', or DistributedDataParallel"
        )
    if calibration is not None and measures(one.criterion):
        raise ConfigError(
            f"{one.key}.criterion: {one.rule.criterion!r} with data of its own needs whole layers, and "
            "fully_shard has spread them. Allowed: DistributedDataParallel"
        )


def check_schedule(one: CoupledRule) -> None:
    """Refuse schedules that depend on zeros inside weights.

    Raises:
        ConfigError: it names the option.
    """
    if PRESENT in (one.rule.initial, *(phase.initial for phase in one.rule.phases)) or any(
        phase.layers is not None for phase in one.rule.phases
    ):
        raise ConfigError(
            f"{one.key}.initial: 'present', and phases with layers, are not supported by the pattern "
            f"{one.rule.pattern!r}. Allowed: a number, and a rule for each choice of layers"
        )
