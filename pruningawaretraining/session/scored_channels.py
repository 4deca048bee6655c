"""The removable groups of a model that is not trained, scored once: what one shot and plans choose from.

Shape suffixes: ``_D`` groups of the dense model, ``_G`` the same, ``_R`` those of the only rule: all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.config.schema import Rule
from pruningawaretraining.config.targets import Target
from pruningawaretraining.costs.macs import LinearCost, macs_cost, macs_per_layer, parameters_cost
from pruningawaretraining.criteria.base import Statistics, scores_of
from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.engine.latency_target import LatencyReached
from pruningawaretraining.engine.statistics_feed import StatisticsFeed
from pruningawaretraining.engine.targets import ROUNDS, Targets
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.masks.pruned_copy import pruned_copy
from pruningawaretraining.patterns.channel import chosen_layers_of
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.patterns.structures import blocks_of_sets
from pruningawaretraining.registry import build
from pruningawaretraining.session.build import BuiltRule, check_scored, find_removable


@dataclass(eq=False)
class OnlyRule:
    """The share of the only rule: every group that was found; see
    :class:`pruningawaretraining.allocation.policies.RuleView`."""

    rule: Rule
    grouping: Grouping
    sets: list[int]
    groups_D: Tensor
    key: str = "rule"
    before: Rule | None = None
    inside: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ScoredChannels:
    """Groups with their scores.

    Attributes:
        model: dense; it is only read.
        rule: which groups, and how they are chosen.
        inputs: example inputs.
        found: the groups.
        scores_G: their importance.
    """

    model: nn.Module
    rule: Rule
    inputs: Any
    found: ChannelGroups
    scores_G: Tensor

    @cached_property
    def macs(self) -> LinearCost:
        """MACs as a function of masks."""
        return macs_cost(self.found.grouping, macs_per_layer(self.model, self.inputs), self.found.costs())

    @cached_property
    def parameters(self) -> LinearCost:
        """Parameters as a function of masks."""
        return parameters_cost(self.found.grouping, self.model)

    @cached_property
    def targets(self) -> Targets:
        """The costs behind targets; latency is measured when it is first asked for."""
        return Targets(self.model, self.found, self.macs, self.parameters, self.inputs)

    def share(self, target: Target) -> OnlyRule:
        """The rule with another target."""
        grouping, rule = self.found.grouping, self.rule.model_copy(update={"target": target})
        groups_D = torch.arange(grouping.size)
        return OnlyRule(rule, grouping, list(range(len(grouping.sets))), groups_D, inside=blocks_of_sets(self.found))

    def meeting(self, target: Target, rounds: int = ROUNDS) -> tuple[Tensor, LatencyReached | None]:
        """The masks that just meet a target, and its latency if it is about that and there are rounds.

        Raises:
            TargetError: it is out of reach.
        """
        everything_D = torch.ones(self.found.grouping.size, dtype=torch.bool)
        share, targets = self.share(target), self.targets
        copied = self.without if rounds else None
        keep_G, _, reached = targets.decide(share, self.scores_G, everything_D, 1.0, copied, rounds)
        return keep_G, reached

    @property
    def without(self) -> Callable[[Tensor], nn.Module]:
        """Copies on the CPU without the groups that a mask drops."""
        return partial(pruned_copy, self.model, self.found, device="cpu")


def scored_channels(
    model: nn.Module, rule: Rule, inputs: Any, calibration: Calibration | None = None, key: str = "rule"
) -> ScoredChannels:
    """Find the groups of a rule on a model, and score them.

    Args:
        model: without a wrapper.
        rule: on channels, heads or blocks of layers.
        inputs: example inputs.
        calibration: data for a criterion that needs any.
        key: of the rule, for messages.

    Raises:
        ConfigError, ModelError: nothing can be pruned, or the criterion needs data.
    """
    pattern, criterion = build("pattern", rule.pattern, "pattern"), build("criterion", rule.criterion, "criterion")
    check_scored(pattern, criterion, rule)
    chosen = chosen_layers_of(pattern, model, rule.layers, rule.exclude)
    found = find_removable(model, [(BuiltRule(key, rule, pattern, criterion), chosen)], inputs)
    feed = StatisticsFeed(key, criterion, model, lambda copy: found.on(copy).grouping)
    scores_G = scores_of(criterion, found.grouping, Statistics(tensors=feed.statistics(calibration)))
    return ScoredChannels(model, rule, inputs, found, scores_G)
