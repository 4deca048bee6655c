"""Rules that prune inside layers: slices, blocks, N:M and single weights. Their zeros stay in the tensors.

Shape suffixes: ``_G`` groups of one rule.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.allocation.ranking import limits_of
from pruningawaretraining.allocation.threshold import allocate, classes_of, zero_groups
from pruningawaretraining.allocation.windows import allocate_windows
from pruningawaretraining.config.options import support_of
from pruningawaretraining.config.schema import Rule
from pruningawaretraining.criteria.base import Statistics, refined, scores_of, solves
from pruningawaretraining.criteria.second_order import Calibration
from pruningawaretraining.engine.compensation import prune_by_curvature
from pruningawaretraining.engine.context import RemovalContext
from pruningawaretraining.engine.dynamics import (
    between_events,
    check_final,
    chosen,
    go_back,
    heard,
)
from pruningawaretraining.engine.nested import counts, described, keep_masks, with_others
from pruningawaretraining.engine.per_layer import fractions_by_rule, limited
from pruningawaretraining.engine.phases import outside_phase, tell_of_whole_epochs, tell_what_stays
from pruningawaretraining.engine.rule import Decision, check_finite
from pruningawaretraining.engine.statistics_feed import StatisticsFeed
from pruningawaretraining.engine.weight_rules import WeightRule, check_phases, check_target, grouping_of, same_tensors
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.masks.masks import Masks
from pruningawaretraining.masks.snapshot import Snapshot
from pruningawaretraining.patterns.elements import input_dims
from pruningawaretraining.patterns.slice import pruned_channels
from pruningawaretraining.registry import build, calling
from pruningawaretraining.schedules import Asked

logger = logging.getLogger(__name__)

Optimizers = Sequence[torch.optim.Optimizer]
DONE = {"prune": "pruned", "unprune": "masks lifted", "lock": "zeros locked"}


class WeightGroups:
    """The rules of one model that prune inside layers.

    Args:
        model: the model.
        rules: (key, rule, built pattern, built criterion) of the rules that are enabled.
        stacked, followers: whether a rule for channels works on the same layers; averages of the model.
    """

    removable = False

    def __init__(
        self,
        model: nn.Module,
        rules: Iterable[tuple[str, Rule, Any, Any]],
        stacked: bool = False,
        followers: Sequence[nn.Module] = (),
    ) -> None:
        self.model, self._followers = model, followers
        self.rules = [self._rule(*one, stacked) for one in rules]
        self._share = any(one.rule.nested for one in self.rules)  # whether rules may prune the same weights
        self._empty: set[tuple[str, str]] = set()  # (rule, layer) without any weight, as has been said

    def _rule(self, key: str, rule: Rule, pattern: Any, criterion: Any, stacked: bool) -> WeightRule:
        grouping = grouping_of(self.model, key, rule, pattern)
        check_target(key, rule, pattern)
        check_phases(self.model, key, rule, grouping)
        own = {each.name: each.name for each in grouping.sets}
        per_layer = fractions_by_rule(rule, self.model, grouping, own, key)
        tell_what_stays(self.model, key, rule, grouping)
        masks = Masks(grouping, dynamic=build("dynamic", rule.dynamic, f"{key}.dynamic"), followers=self._followers)
        one = WeightRule(key, rule, pattern, criterion, grouping, masks, stacked)
        one.fractions = per_layer
        masks.choose = between_events(self.model, one)
        masks.snapshot = Snapshot.of(self.model, one.dynamic)

        def grouping_on(model: nn.Module) -> Grouping:
            return one.grouping if model is self.model else grouping_of(model, key, rule, pattern)

        one.feed = StatisticsFeed(key, criterion, self.model, grouping_on)
        return one

    @property
    def masks(self) -> list[Masks]:
        """The masks of every rule."""
        return [one.masks for one in self.rules]

    def ready(self, one: WeightRule, now: int, calibration: Calibration | None) -> bool:
        """Whether the rule's event can take place; it waits for the first gradients where it needs them."""
        return one.rule.mode != "prune" or (one.feed.ready(calibration) and heard(one, now))

    def check(self, calibration: Calibration | None) -> None:
        """Refuse rules of second order whose masks are not final, once there is data for them.

        Raises:
            ConfigError: it names the rule and its dynamic.
        """
        for one in self.rules:
            if calibration is not None and solves(one.criterion):
                check_final(one)

    # --- events -------------------------------------------------------------------------------------------------

    def begin(self, one: WeightRule, context: RemovalContext) -> None:
        """The rule has its first event: what other rules have masked counts, and zeros that are there may."""
        tell_of_whole_epochs(one.key, one.times)
        keep_G = with_others(one, self.rules if self._share else ())
        if one.rule.keep_zeros or one.rule.mode == "lock":
            keep_G = keep_G & ~zero_groups(one.grouping).to(keep_G.device)
        if keep_G is not one.masks.keep_G:
            self.mask(one, keep_G, context.optimizers)
            one.state.initial = one.sparsity

    def decide(self, one: WeightRule, now: int, calibration: Calibration | None, trial: bool = False) -> Decision:
        """The rule's next masks; a rule of second order with data of its own moves the weights that stay as well."""
        if one.rule.mode != "prune":
            return Decision(one.masks.keep_G if one.rule.mode == "lock" else torch.ones_like(one.masks.keep_G), True)
        check_finite(one.key, one.grouping)
        keep_G, scores_G = with_others(one, self.rules if self._share else ()), None
        for asked in one.times.asked(now, one.reached):
            if asked.sparsity == 0 and one.rule.min_sparsity == 0:
                continue
            if calibration is not None and solves(one.criterion):
                keep_G = prune_by_curvature(calibration, one, one.grouping, keep_G, asked)
                continue
            statistics = Statistics(keep_G=keep_G, tensors=one.feed.statistics(calibration))
            with one.masks.dense():
                scores_G = self.scores(one, statistics)
                event = one.event(now, one.grouping, keep_G, scores_G, asked.sparsity, one.state.event)
                keep_G = chosen(self.model, one, event, partial(self._allocated, one, scores_G, statistics, asked))
        if one.dynamic.listens:
            one.masks.passing, one.gradient_G = False, None
        return Decision(keep_G, one.is_last(now), scores_G)

    def scores(self, one: WeightRule, statistics: Statistics) -> Tensor:
        """Scores of the rule's groups."""
        scores_G = scores_of(one.criterion, one.grouping, statistics)
        later = one.parts > 1  # then they are kept, while what is gathered goes on changing
        return scores_G.to(one.masks.keep_G.device, copy=later)

    def _allocated(self, one: WeightRule, scores_G: Tensor, statistics: Statistics, asked: Asked) -> Tensor:
        """The masks that an event asks for; what is masked stays so, and layers that it is not about are left alone."""
        keep_G = statistics.keep_G
        assert keep_G is not None
        outside_G = outside_phase(self.model, one.grouping, asked.layers, f"{one.key}.phases", scores_G.device)
        next_G = self._chosen(one, scores_G, statistics, asked.sparsity, outside_G)
        return next_G if outside_G is None else torch.where(outside_G, keep_G, next_G)

    def _chosen(
        self, one: WeightRule, scores_G: Tensor, statistics: Statistics, sparsity: float, outside_G: Tensor | None
    ) -> Tensor:
        limits, so_far_G = limits_of(one.rule), statistics.keep_G
        if one.fractions is not None:
            limits, sparsity = limited(limits, one.fractions, sparsity), 0.0
        untouched = so_far_G is None or (so_far_G is one.masks.keep_G and not one.masks.active)
        removed_G = None if untouched or so_far_G is None or not one.dynamic.nested else ~so_far_G
        classes_S = classes_of(one.grouping, one.rule.scope)
        window = getattr(one.pattern, "window", None)
        if window is not None:
            dims, key = input_dims(self.model, one.grouping), f"{one.key}.target.sparsity"
            return allocate_windows(scores_G, one.grouping, window, sparsity, dims, limits, classes_S, removed_G, key)
        exempt_G = outside_G
        if one.stacked or support_of(one.pattern).spares_pruned:
            gone_G = pruned_channels(one.grouping, one.masks.keep_G)
            gone_G = gone_G if outside_G is None else gone_G | outside_G
            exempt_G = gone_G if bool(gone_G.any()) else None
        sizes = one.grouping.set_sizes.tolist()
        keep_G = allocate(scores_G, sizes, sparsity, limits, classes_S, removed_G, exempt_G)
        return refined(one.criterion, one.grouping, keep_G, statistics, one.dynamic.nested)

    def put(self, one: WeightRule, keep_G: Tensor, context: RemovalContext, calibration: Calibration | None) -> None:
        """Apply the masks of an event."""
        go_back(one, one.masks, context.optimizers)
        self.mask(one, keep_G, context.optimizers)
        for each, kept in zip(one.grouping.sets, one.masks.kept_by_set, strict=True):
            if not kept and (empty := (one.key, each.name)) not in self._empty:  # the model may be cut in two there
                self._empty.add(empty)
                logger.warning("%s: no weight is left in %s; max_sparsity below 1 keeps some in every layer", *empty)

    def mask(self, one: WeightRule, keep_G: Tensor, optimizers: Optimizers) -> None:
        """Mask weights, gradients and optimizer state, as far as the rule's dynamic says."""
        with calling("dynamic", one.dynamic, "true or false"):
            later = one.dynamic.defers(one.masks, keep_G)
        if later:
            return
        one.masks.set(keep_G)
        one.masks.apply_to_gradients()
        one.masks.apply_to_state(optimizers)

    def keep_of(self, one: WeightRule) -> Tensor:
        """The rule's masks."""
        return one.masks.keep_G

    def settle(self) -> None:
        """Masked weights are 0 from now on, whatever the dynamics were."""
        for one in self.rules:
            one.masks.settle_for_good()

    def summary(self, one: WeightRule) -> tuple[str, str]:
        """The verb of an event, and what has been reached, for the log."""
        return f"{DONE[one.rule.mode]},", f"sparsity {one.sparsity:.4f}"

    # --- what has been reached ----------------------------------------------------------------------------------

    @property
    def groups(self) -> tuple[int, int]:
        """(groups, those that are masked) of all rules."""
        return counts(self.rules)

    @property
    def finished(self) -> list[str]:
        """Keys of the rules that have reached their target, or are at a member of their family."""
        return [one.key for one in self.rules if one.phase == "finetune"]

    def norms(self) -> dict[str, Tensor]:
        """L2 norms of all groups by the name of their weight, on the CPU."""
        return {name: norm_S for one in self.rules for name, norm_S in one.norms().items()}

    def keep_masks(self) -> dict[str, Tensor]:
        """Name of each weight -> keep mask of its groups, on the CPU."""
        return keep_masks(self.rules)

    def describe_sets(self) -> list[dict[str, Any]]:
        """One dict for each weight: source, dependencies (none), size and kept groups."""
        return described(self.rules)

    # --- changes of the model, and state ------------------------------------------------------------------------

    def rebind(self, calibration: Calibration | None) -> None:
        """Take the model's parameters as they are now, by their names: ``fully_shard`` has exchanged them.

        Raises:
            ConfigError: a rule by second order with data of its own.
        """
        for one in self.rules:
            if calibration is not None and solves(one.criterion):
                raise ConfigError(
                    f"{one.key}.criterion: {one.rule.criterion!r} compensates whole layers, and fully_shard has spread "
                    "them. Allowed: DistributedDataParallel, or pruning before fully_shard"
                )
        self.follow_tensors()

    def follow_tensors(self) -> None:
        """Take the model's parameters as they are now, by their names."""
        for one in self.rules:
            members = tuple(replace(m, parameter=self.model.get_parameter(m.name)) for m in one.grouping.members)
            one.grouping = replace(one.grouping, members=members, _cache={})
            one.masks = one.masks.on(one.grouping)
            one.feed.rebind()

    def rebuild(self, optimizers: Optimizers) -> None:
        """Label the weights again after channels have been removed; rules that had begun keep their sparsity."""
        for one in self.relabel():
            if not one.state.event or (one.rule.release and one.state.phase == "finetune"):
                continue
            if one.rule.mode == "prune" and one.state.last is not None:
                self._mask_again(one, optimizers)
            elif one.rule.mode != "unprune":  # zeros that it has locked, or taken from a file
                self.mask(one, ~zero_groups(one.grouping), optimizers)

    def _mask_again(self, one: WeightRule, optimizers: Optimizers) -> None:
        """Decide once more, on the groups that are left, on everything that the rule's events have asked for so far."""
        assert one.state.last is not None
        for now in [*one.times.ends_before(one.state.last), one.state.last]:
            for asked in one.times.asked(now, one.reached):
                statistics = Statistics(keep_G=one.masks.keep_G, tensors=one.feed.statistics(None, required=False))
                scores_G = self.scores(one, statistics)
                event = one.event(now, one.grouping, one.masks.keep_G, scores_G, asked.sparsity, one.state.event - 1)
                keep_G = chosen(self.model, one, event, partial(self._allocated, one, scores_G, statistics, asked))
                one.masks.set(keep_G)  # at once: nothing fades a second time
                self.mask(one, keep_G, optimizers)

    def relabel(self) -> list[WeightRule]:
        """New rules, without masks, for those whose weights are others than before; returns the new ones."""
        renewed = []
        for number, old in enumerate(self.rules):
            if same_tensors(old.grouping, grouping_of(self.model, old.key, old.rule, old.pattern)):
                continue  # nothing of it has gone: what it has gathered stays
            old.masks.clear()
            old.feed.end()
            new = self._rule(old.key, old.given, old.pattern, old.criterion, old.stacked)
            new.state, new.timelines = replace(old.state, begun=None, part=0, would=None), old.timelines
            self.rules[number] = new
            renewed.append(new)
        return renewed
