"""From a config to an engine: which rules there are, and the groups that they find in a model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pruningawaretraining.config.options import support_of
from pruningawaretraining.config.schema import PruningConfig, Rule
from pruningawaretraining.criteria.base import check_kind
from pruningawaretraining.engine.coupled import CoupledGroups
from pruningawaretraining.engine.weight_rules import check_lifted
from pruningawaretraining.engine.weights import WeightGroups
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.masks.dry_run import removable_blocks, removable_channels
from pruningawaretraining.models.calling import ForwardFn, from_shapes
from pruningawaretraining.patterns.block_names import candidates
from pruningawaretraining.patterns.channel import chosen_layers_of, head_units_of, own_groups
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.patterns.channel_labels import producer_names
from pruningawaretraining.patterns.config_kinds import with_config_kinds
from pruningawaretraining.patterns.coupling import TRACE_LIMIT
from pruningawaretraining.patterns.depth import check_alone
from pruningawaretraining.patterns.expert import Expert, expert_names
from pruningawaretraining.patterns.stacking import Claim, check_stacking
from pruningawaretraining.patterns.structures import together
from pruningawaretraining.registry import build

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltRule:
    """A rule that is enabled, with its pattern and criterion built."""

    key: str
    rule: Rule
    pattern: Any
    criterion: Any

    @property
    def parts(self) -> tuple[str, Rule, Any, Any]:
        """(key, rule, pattern, criterion)."""
        return self.key, self.rule, self.pattern, self.criterion

    def chosen(self, model: nn.Module) -> set[str]:
        """The layers or blocks that a rule of removable groups selects."""
        return chosen_layers_of(self.pattern, model, self.rule.layers, self.rule.exclude, self.key)


@dataclass(frozen=True)
class BuiltRules:
    """The rules that are enabled: those whose groups can be removed, and those inside layers."""

    coupled: tuple[BuiltRule, ...] = ()
    weights: tuple[BuiltRule, ...] = ()

    @property
    def are_uniform(self) -> bool:
        """Whether all rules of groups that can be removed keep equally many in layers of a kind."""
        return bool(self.coupled) and all(one.rule.widths == "uniform" for one in self.coupled)


def built_rules(config: PruningConfig) -> BuiltRules:
    """Build the patterns and criteria of a config.

    Raises:
        ConfigError: options that do not go together.
    """
    built = []
    for number, rule in enumerate(config.rules):
        key = rule.name or f"rules[{number}]"
        pattern = build("pattern", rule.pattern, f"{key}.pattern")
        criterion = build("criterion", rule.criterion, f"{key}.criterion")
        if rule.enabled:
            check_scored(pattern, criterion, rule, f"{key}.criterion")
            built.append(BuiltRule(key, rule, pattern, criterion))
    check_alone([(one.key, one.pattern) for one in built])
    removable = [support_of(one.pattern).removable for one in built]
    coupled = tuple(one for one, can_go in zip(built, removable, strict=True) if can_go)
    weights = tuple(one for one, can_go in zip(built, removable, strict=True) if not can_go)
    return BuiltRules(coupled, weights)


def check_scored(pattern: Any, criterion: Any, rule: Rule, key: str = "criterion") -> None:
    """Refuse a criterion that cannot score the groups of a rule's pattern.

    Args:
        pattern, criterion: of the rule, built.
        rule: the rule.
        key: of the criterion, for messages.

    Raises:
        ConfigError: it names the criterion, and those that can.
    """
    more = [kind for name, kind in (("experts", "expert"), ("depth", "block")) if getattr(pattern, name, False)]
    for one in (support_of(pattern).kind, *more):
        check_kind(criterion, one, key, rule.criterion, rule.pattern)


def build_weights(model: nn.Module, rules: BuiltRules, followers: Sequence[nn.Module] = ()) -> WeightGroups | None:
    """Label the weights of the rules inside layers; None without any.

    Raises:
        ConfigError, ModelError, TargetError: a layer, pattern or target that cannot be used.
    """
    if not rules.weights:
        return None
    weights = WeightGroups(model, [one.parts for one in rules.weights], bool(rules.coupled), followers)
    producers = set(producer_names(model))
    claims = [Claim(one.key, "channel", sorted(one.chosen(model) & producers)) for one in rules.coupled]
    for rule in weights.rules:
        check_lifted(rule, weights.rules)
        layers = [layer.name for layer in rule.grouping.sets]
        claims.append(Claim(rule.key, rule.grouping.name, layers, rule.rule.nested, rule.dynamic.lives))
    check_stacking(claims)
    return weights


def build_coupled(
    model: nn.Module,
    rules: Iterable[BuiltRule],
    inputs: Any,
    forward_fn: ForwardFn | None,
    trace_limit: float,
    followers: Sequence[nn.Module] = (),
) -> CoupledGroups:
    """Trace a model and find the groups that can be removed from it.

    Args:
        model: dense.
        rules: those of removable groups.
        inputs, forward_fn: how to run the model.
        trace_limit: seconds that the search for coupled channels may take.
        followers: moving averages of the model.

    Raises:
        ModelError: the inputs are rejected, or nothing can be pruned.
    """
    chosen = [(one, one.chosen(model)) for one in rules]
    found = find_removable(model, chosen, inputs, forward_fn, trace_limit)
    if any(one.rule.widths == "uniform" for one, _ in chosen):
        found = with_config_kinds(model, found)
    for name, reason in found.skipped.items():
        logger.info("%s stays as it is: %s", name, reason)
    parts = [(*one.parts, layers) for one, layers in chosen]
    coupled = CoupledGroups(model, found, parts, inputs, forward_fn, followers)
    for rule in coupled.rules:
        check = getattr(rule.criterion, "check", None)
        if check is not None:
            check(found.grouping, rule.sets, rule.key)
    return coupled


def find_removable(
    model: nn.Module,
    chosen: Sequence[tuple[BuiltRule, set[str]]],
    inputs: Any,
    forward_fn: ForwardFn | None = None,
    trace_limit: float = TRACE_LIMIT,
) -> ChannelGroups:
    """The groups of some rules that can be removed from a model: channels, heads and residual blocks.

    Args:
        model: dense; it is as before afterwards.
        chosen: each rule with the layers and blocks that it selects.
        inputs, forward_fn: how to run the model.
        trace_limit: seconds that the search for coupled channels may take.

    Raises:
        ModelError: the inputs are rejected, or nothing can be pruned.
    """
    union = set().union(*(layers for _, layers in chosen))
    if any(support_of(one.pattern).kind == "block" for one, _ in chosen):
        return removable_blocks(model, inputs, union, forward_fn)
    found = _channels(model, chosen, union, inputs, forward_fn, trace_limit)
    if any(getattr(one.pattern, "depth", False) for one, _ in chosen):
        return _with_blocks(model, found, union & set(candidates(model)), inputs, forward_fn)
    return found


def _with_blocks(
    model: nn.Module, found: ChannelGroups, chosen: set[str], inputs: Any, forward_fn: ForwardFn | None
) -> ChannelGroups:
    """The channels with the residual blocks beside them; without any that can go, that is said."""
    try:
        return together(found, removable_blocks(model, inputs, chosen, forward_fn))
    except ModelError as error:
        logger.warning("depth: %s", error)
        return found


def _channels(
    model: nn.Module,
    chosen: Sequence[tuple[BuiltRule, set[str]]],
    union: set[str],
    inputs: Any,
    forward_fn: ForwardFn | None,
    trace_limit: float,
) -> ChannelGroups:
    units: dict[str, str] = {}
    own: list[ChannelGroups] = []
    for one, layers in chosen:
        mine, taken = _own_groups(one, model, layers)
        own += mine
        # costs are counted by outputs and inputs: a weight that loses experts keeps its hidden width
        union = union - taken - {name for name in union if name.rpartition(".")[0] in taken}
        units |= head_units_of(one.pattern, model, layers)
        if getattr(one.pattern, "depth", False):
            union = union - (set(candidates(model)) - units.keys())
    multiples = {name: one.rule.multiple for one, layers in chosen for name in layers}
    return removable_channels(model, inputs, union, forward_fn, multiples, units, trace_limit, own)


def _own_groups(one: BuiltRule, model: nn.Module, layers: set[str]) -> tuple[list[ChannelGroups], set[str]]:
    """The groups that a rule's pattern finds without a trace, experts beside other structures included; and the
    modules that they are of."""
    if not getattr(one.pattern, "experts", False):
        mine = own_groups(one.pattern, model, layers)
        return mine, layers if mine else set()
    taken, experts = expert_names(model) & layers, Expert()
    if not taken:
        try:
            experts.chosen(model, one.rule.layers, one.rule.exclude, one.key)
        except ConfigError as error:
            logger.warning("expert: %s", error)
    return own_groups(experts, model, taken) if taken else [], taken


def inputs_of(config: PruningConfig, model: nn.Module) -> Any:
    """Example inputs of the shapes that a config gives, in the model's dtype; None without any."""
    if config.example_inputs is None:
        return None
    spec = config.example_inputs
    dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), dtype)
    return from_shapes(spec.shape, spec.container, dtype)
