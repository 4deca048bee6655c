"""Rules whose groups can be removed: channels, heads and residual blocks, coupled through the model.

Shape suffixes: ``_D`` groups of the dense model, ``_G`` groups that are still there, ``_R`` groups of one rule.

Targets, caps and counts always speak of the dense model, also when every event removes groups for good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.allocation.policies import scope_of
from pruningawaretraining.allocation.ranking import Allocator, limits_of
from pruningawaretraining.allocation.uniform import uniform
from pruningawaretraining.config.schema import Rule
from pruningawaretraining.costs.macs import macs_cost, macs_per_layer, parameters_cost
from pruningawaretraining.criteria.base import Statistics, scores_of
from pruningawaretraining.criteria.second_order import Calibration
from pruningawaretraining.criteria.second_order.channels import MAKE_UP_BATCHES, compensate, recalibrate_norms
from pruningawaretraining.distributed.collectives import same_buffers
from pruningawaretraining.engine.context import RemovalContext
from pruningawaretraining.engine.coupled_rules import (
    CoupledRule,
    LiveCost,
    assign,
    check_caps,
    check_data,
    check_schedule,
    check_sharded,
    common_dynamic,
    norms_of_sets,
    set_of_layer,
    started_from,
)
from pruningawaretraining.engine.dynamics import go_back
from pruningawaretraining.engine.per_layer import fractions_by_rule, limited
from pruningawaretraining.engine.phases import tell_of_whole_epochs
from pruningawaretraining.engine.rule import Decision, check_finite
from pruningawaretraining.engine.statistics_feed import StatisticsFeed
from pruningawaretraining.engine.targets import Targets
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.masks.masks import Masks, hand_on
from pruningawaretraining.masks.pruned_copy import pruned_copy
from pruningawaretraining.masks.snapshot import Snapshot
from pruningawaretraining.models.calling import ForwardFn
from pruningawaretraining.models.example_inputs import Example
from pruningawaretraining.models.widths import conv_linear_widths
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.patterns.structures import blocks_of_sets
from pruningawaretraining.report.summary import latency_text


class CoupledGroups:
    """The groups of one model that can be removed, and the rules that prune them.

    Args:
        model: the model, dense.
        found: its groups.
        rules: (key, rule, built pattern, built criterion, names of the layers it may prune).
        inputs, forward_fn, followers: how to run the model, and moving averages of it.

    Attributes:
        reset_optimizer: set by a removal, for loops that build a new optimizer then and clear it.
        sharded: whether ``fully_shard`` has spread the parameters.
        spared: tensors that are not masked, since an exported graph divides by them.
        of: what the log's fractions are of, where that is not the dense model.
    """

    removable = True

    def __init__(
        self,
        model: nn.Module,
        found: ChannelGroups,
        rules: Sequence[tuple[str, Rule, Any, Any, set[str]]],
        inputs: Any,
        forward_fn: ForwardFn | None = None,
        followers: Sequence[nn.Module] = (),
    ) -> None:
        self.model, self.forward_fn, self.example = model, forward_fn, Example(inputs, model)
        self.followers = followers
        self.found = found
        self.dense_sets = found.grouping.sets
        self.dense_per_layer = macs_per_layer(model, inputs, forward_fn)
        self.macs_cost = macs_cost(found.grouping, self.dense_per_layer, found.costs())
        self.parameters_cost = parameters_cost(found.grouping, model)
        self.targets = Targets(model, found, self.macs_cost, self.parameters_cost, inputs, forward_fn)
        self.dense_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.dense_widths = conv_linear_widths(model)
        self.set_of_layer = set_of_layer(found.grouping)
        self.dense_types = {name: type(module).__name__ for name, module in model.named_modules()}
        self.keep_D = torch.ones(found.grouping.size, dtype=torch.bool)
        self.live_D = torch.arange(found.grouping.size)  # dense numbers of the groups that are still there
        self.rules = assign(found.grouping, rules, blocks_of_sets(found))
        self.make_feeds()
        self.spared: frozenset[str] = frozenset()
        self.dynamic = common_dynamic(self.rules)
        self.masks = Masks.coupled(model, found, dynamic=self.dynamic, followers=followers)
        self.masks.snapshot = Snapshot.of(model, self.dynamic)
        self.reset_optimizer = False
        self.sharded, self.of = False, ""

    def make_feeds(self) -> None:
        """Give every rule a new feed."""
        for one in self.rules:
            one.feed = StatisticsFeed(one.key, one.criterion, self.model, self._grouping_of(one))

    def _grouping_of(self, one: CoupledRule) -> Callable[[nn.Module], Grouping]:
        """The rule's groups on the model or a copy."""

        def grouping_on(model: nn.Module) -> Grouping:
            found = self.found if model is self.model else self.found.on(model)
            return found.grouping.select_sets(one.sets)

        return grouping_on

    def mask_again(self, keep_G: Tensor) -> None:
        """Build the masks again, after groups or tensors have changed."""
        masks = Masks.coupled(self.model, self.found, self.spared, self.dynamic, self.followers)
        masks.snapshot, self.masks = self.masks.snapshot, masks
        masks.set(keep_G)

    @property
    def removed(self) -> bool:
        """Whether any group has been removed physically."""
        return len(self.live_D) < len(self.keep_D)

    # --- checks -------------------------------------------------------------------------------------------------

    def check_targets(self) -> None:
        """Refuse a target that no mask within the limits reaches, before any training is spent on it.

        Raises:
            TargetError, ConfigError: it names the target, and what can be reached.
        """
        for one in (each for each in self.rules if each.works):  # a file may meet a target already
            check_schedule(one)
            one.fractions = fractions_by_rule(one.rule, self.model, one.grouping, self.set_of_layer, one.key)
            check_caps(one, self.model)
            allocator = Allocator(one.grouping, torch.zeros(one.grouping.size), limits_of(one.rule), scope_of(one))
            if one.rule.target.about_costs and one.rule.enabled:
                self.targets.check(one, one.members[-1])
            if (sparsity := one.given.target.last_sparsity) is not None:
                allocator.check_sparsity(sparsity, f"{one.key}.target.sparsity")

    def check(self, calibration: Calibration | None) -> None:
        """Refuse a compensation without data at the first event to come, and not only at the event itself.

        Raises:
            ConfigError: it names the rule.
        """
        for one in self.rules:
            check_data(one, calibration)

    def ready(self, one: CoupledRule, now: int, calibration: Calibration | None) -> bool:
        """Whether the rule's event can take place; events of epochs say why they cannot, those of steps wait."""
        return one.times.counts == "epoch" or one.feed.ready(calibration)

    # --- events -------------------------------------------------------------------------------------------------

    def begin(self, one: CoupledRule, context: RemovalContext) -> None:
        """The rule has its first event."""
        tell_of_whole_epochs(one.key, one.times)

    def decide(self, one: CoupledRule, now: int, calibration: Calibration | None, trial: bool = False) -> Decision:
        """The rule's next masks, and whether its target is met with them; no latency is measured for a trial."""
        rule, taken_D = one.rule, started_from(one, self.keep_D, self.live_D)
        check_finite(one.key, self.found.grouping.select_sets(one.sets).without_role("buffer"))
        with self.masks.dense():
            scores_R = self.scores(one, calibration)
        if rule.target.about_costs:
            copied = None if trial else self._copy_of
            keep_R, met, reached = self.targets.decide(one, scores_R, taken_D, one.times.progress(now), copied)
            if reached is not None:
                one.state.latencies = [*one.state.latencies, {"at": now, **vars(reached)}]
            return Decision(keep_R, met)
        limits, asked = limits_of(one.rule), one.asked(now)
        if one.fractions is not None:
            limits, asked = limited(limits, one.fractions, asked), 0.0
        allocator = Allocator(one.grouping, scores_R, limits, scope_of(one), ~taken_D[one.groups_D])
        keep_R = allocator.at(asked)
        keep_R = uniform(one.grouping, keep_R, scores_R) if rule.widths == "uniform" else keep_R
        return Decision(keep_R, one.is_last(now))

    def _copy_of(self, keep_D: Tensor) -> nn.Module:
        """A copy of the model as it is now, without the groups that these masks drop."""
        return pruned_copy(self.model, self.found, keep_D[self.live_D], "cpu")

    def scores(self, one: CoupledRule, calibration: Calibration | None = None) -> Tensor:
        """Scores of the rule's groups; those that are gone already score lowest.

        Raises:
            ExtensionError: the criterion raises, or does not return a number for each group.
            ModelError: no step has been seen yet.
        """
        grouping = self.found.grouping.select_sets(one.sets)
        mine_G, live_R = torch.isin(self.live_D, one.groups_D), torch.isin(one.groups_D, self.live_D)
        cost = LiveCost(self.macs_cost, self.keep_D, self.live_D[mine_G])
        tensors = one.feed.statistics(calibration)
        statistics = Statistics(cost, self.keep_D[self.live_D[mine_G]], one.state.scale, tensors=tensors)
        if one.state.first is not None:
            statistics.first_G = one.state.first[live_R]
        scores = scores_of(one.criterion, grouping, statistics)
        if one.state.first is None and statistics.first_G is not None and bool(live_R.all()):
            one.state.scale, one.state.first = statistics.scale, statistics.first_G.cpu()
        scores_R = torch.full((len(one.groups_D),), -torch.inf, dtype=torch.float64)
        scores_R[live_R] = scores.cpu().double()
        return scores_R

    def put(self, one: CoupledRule, keep_R: Tensor, context: RemovalContext, calibration: Calibration | None) -> None:
        """Mask; before it the layers that read what goes make up for it, after it norms are measured again."""
        go_back(one, self.masks, context.optimizers)
        if not one.compensates or calibration is None:
            self.mask(one, keep_R, context.optimizers)
            return
        keep_G = self.keep_D.index_copy(0, one.groups_D, keep_R)[self.live_D]
        compensate(self.model, self.found.grouping, keep_G, calibration, one.rule.compensation)
        self.mask(one, keep_R, context.optimizers)
        recalibrate_norms(self.model, calibration, MAKE_UP_BATCHES)
        same_buffers(self.model)

    def mask(self, one: CoupledRule, keep_R: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Mask weights, gradients and optimizer state."""
        keep_D = self.keep_D.index_copy(0, one.groups_D, keep_R)
        self.masks.set(keep_D[self.live_D])
        self.keep_D = keep_D
        self.masks.apply_to_gradients()
        self.masks.apply_to_state(optimizers)

    def keep_of(self, one: CoupledRule) -> Tensor:
        """The rule's masks."""
        return self.keep_D[one.groups_D]

    def settle(self) -> None:
        """Masked weights are 0 from now on, whatever the dynamics were."""
        self.masks.settle_for_good()

    def summary(self, one: CoupledRule) -> tuple[str, str]:
        """The verb of an event, and what has been reached, for the log."""
        fraction = self.macs_cost(self.keep_D) / max(self.macs_cost.dense, 1.0)
        reached = "".join(f", {latency_text(event)}" for event in one.state.latencies[-1:])
        return "masked to", f"sparsity {self.sparsity:.4f}, {fraction:.4f} of the MACs{self.of}{reached}"

    # --- what has been reached ----------------------------------------------------------------------------------

    @property
    def groups(self) -> tuple[int, int]:
        """(groups of the dense model, those that are masked or removed)."""
        return len(self.keep_D), int((~self.keep_D).sum())

    @property
    def sparsity(self) -> float:
        """Fraction of the groups that are masked or removed."""
        groups, gone = self.groups
        return gone / groups if groups else 0.0

    def norms(self) -> dict[str, Tensor]:
        """L2 norms of the live groups by set, over output and input weights and norm weights (on the CPU)."""
        return norms_of_sets(self.found.grouping)

    def keep_masks(self) -> dict[str, Tensor]:
        """Masks of the dense model's groups by set, True = keep."""
        return {one.name: self.keep_D[one.start : one.stop].clone() for one in self.dense_sets}

    # --- changes of the model -----------------------------------------------------------------------------------

    def rebind(self, calibration: Calibration | None) -> None:
        """Take the model's parameters as they are now, by their names: ``fully_shard`` has exchanged them.

        Raises:
            ConfigError: a rule removes at every event, has a latency to reach, or needs whole layers.
        """
        for one in self.rules:
            self.targets.check_sharded(one)
            check_sharded(one, calibration)
        self.sharded = True
        self.follow_tensors()

    def follow_tensors(self) -> None:
        """Take the model's parameters as they are now, by their names."""
        before = self.masks
        self.found = self.found.on(self.model)
        for one in self.rules:
            one.feed.rebind()
        self.masks = Masks.coupled(self.model, self.found, self.spared, before.dynamic, self.followers)
        hand_on(before, self.masks)

    def follow_removal(self, keep_G: Tensor) -> None:
        """Groups have been removed from the model: go on with those that are left."""
        self.found = self.found.restrict(self.model, keep_G)
        for one in self.rules:
            one.feed.follow(keep_G[torch.isin(self.live_D, one.groups_D)])
        self.live_D = self.live_D[keep_G]
        self.masks = Masks.coupled(self.model, self.found, self.spared, self.dynamic, self.followers)
