"""Rules for channels, heads and blocks: each with its share of the model's groups, and where it stands.

Shape suffixes: ``_D`` groups of the dense model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pruningawaretraining.allocation.ranking import Limits, limits_of
from pruningawaretraining.config.schema import Rule
from pruningawaretraining.criteria.base import Criterion
from pruningawaretraining.engine.statistics_feed import StatisticsFeed
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.groups.grouping import Grouping, GroupSet
from pruningawaretraining.registry import build
from pruningawaretraining.schedules import PRESENT, Timeline

PHASES = ("regularize", "prune", "finetune", "done")


@dataclass
class RuleState:
    """Where one rule stands.

    Args:
        phase: one of ``PHASES``.
        event: firings so far.
        last: the last epoch (or step) that fired.
        scale: what the first event divided the scores of each set by.
        first: scores of all groups before that, at the first event. Later events divide by the same scale, corrected
            for how the groups that are left have changed, so that those that are gone do not change how layers compare.
        latencies: predicted and measured at every event of a latency target.
    """

    phase: str = "regularize"
    event: int = 0
    last: int | None = None
    scale: list[float] | None = None
    first: Tensor | None = None
    latencies: list[dict[str, Any]] = field(default_factory=list)


@dataclass(eq=False)
class ChannelRule:
    """A rule with its share of the model's channels.

    Args:
        rule: the configuration.
        key: how messages call it.
        sets: numbers of its sets.
        groups_D: its groups, as indices of the dense model's groups.
        grouping: the same groups alone (without members), renumbered.
        listener: gathers what its criterion needs.
    """

    rule: Rule
    key: str
    sets: list[int]
    groups_D: Tensor
    grouping: Grouping
    state: RuleState = field(default_factory=RuleState)
    listener: StatisticsFeed = field(init=False)
    times: Timeline = field(init=False)

    def __post_init__(self) -> None:
        self.times = self.rule.timeline()

    @cached_property
    def criterion(self) -> Criterion:
        built: Criterion = build("criterion", self.rule.criterion, f"{self.key}.criterion")
        return built

    def fires(self, now: int) -> bool:
        """Whether an epoch (or step) prunes: at start and every ``every`` from there on, once each."""
        if self.state.phase in ("finetune", "done"):
            return False
        return self.times.is_event(now) and (self.state.last is None or now > self.state.last)

    def asks(self, steps: range, last: bool) -> bool:
        """Whether it matters for an event (the last one alone) which of these is the number of real steps."""
        if self.times.counts != "step" or not self.rule.enabled or (last and self.times.last not in steps):
            return False
        return any(self.fires(now) for now in steps[max(0, self.times.first - steps.start) :])

    def limits(self) -> Limits:
        return limits_of(self.rule)


def assign(grouping: Grouping, rules: Sequence[tuple[str, Rule, set[str]]]) -> list[ChannelRule]:
    """Give every set to the rule that selects its source layer.

    Raises:
        ConfigError: two rules select one set.
    """
    owner: dict[int, str] = {}
    assigned = []
    for key, rule, layers in rules:
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
        assigned.append(_channel_rule(grouping, key, rule, numbers))
    return assigned


def _channel_rule(grouping: Grouping, key: str, rule: Rule, numbers: list[int]) -> ChannelRule:
    sets: list[GroupSet] = []
    start = 0
    for number in numbers:
        one = grouping.sets[number]
        sets.append(GroupSet(one.name, start, start + one.size, one.width, one.signature, one.layers))
        start += one.size
    groups_D = torch.cat([torch.arange(grouping.sets[number].start, grouping.sets[number].stop) for number in numbers])
    return ChannelRule(rule, key, numbers, groups_D, Grouping(grouping.name, (), tuple(sets)))


def refuse_what_channels_lack(one: ChannelRule) -> None:
    """Refuse what only rules on weights can do, instead of passing over it.

    Raises:
        ConfigError: a mode or option of weight patterns.
    """
    regularizer = None if one.rule.regularizer is None else build("regularizer", one.rule.regularizer)
    if regularizer is not None and not hasattr(regularizer, "prepare"):
        raise ConfigError(
            f"{one.key}.regularizer: {one.rule.regularizer!r} is for slices and blocks. "
            "Allowed: bn_scale, group_lasso, growing_l2"
        )
    if one.rule.mode != "prune":
        raise ConfigError(f"{one.key}.mode: {one.rule.mode!r} is for slices, blocks and weights. Allowed: 'prune'")
    if one.rule.initial == PRESENT or any(phase.layers for phase in one.rule.phases):
        raise ConfigError(
            f"{one.key}.initial: 'present', and phases with layers, are for slices, blocks and weights. Allowed: a "
            "number, and phases without layers"
        )
    for option in ("keep_zeros", "progressive"):
        value, default = getattr(one.rule, option), Rule.model_fields[option].default
        if value != default:
            raise ConfigError(f"{one.key}.{option}: {value!r} is for slices, blocks and weights. Allowed: {default!r}")
