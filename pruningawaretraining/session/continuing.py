"""Pruning on: the rules of a model that was pruned before go on where those of its earlier pruner have stopped.

The model may have come from a file, be a copy or a pickle, or still be the object that was pruned: its record says what
has gone. Targets speak of the dense model, so those of a model that has lost something already are expressed in what is
left of it. A rule whose target is met prunes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pruningawaretraining.allocation.threshold import zero_groups
from pruningawaretraining.config.schema import Rule
from pruningawaretraining.config.targets import Target
from pruningawaretraining.engine.coupled import CoupledGroups
from pruningawaretraining.engine.coupled_rules import CoupledRule
from pruningawaretraining.engine.per_layer import fractions_by_rule
from pruningawaretraining.engine.weight_rules import WeightRule
from pruningawaretraining.engine.weights import WeightGroups
from pruningawaretraining.groups.grouping import GroupSet

logger = logging.getLogger(__name__)

NEAR = 0.03
"""A target that is missed by less than this counts as met: limits and multiples leave some of it."""

MET = "%s: the model was pruned before and meets the target, which is one of the dense model: nothing more is pruned"
PER_LAYER = ("sparsity_per_layer", "keep_per_layer")
"""Options that take the place of a target in rules that give layers one by one."""


def goals_of(rules: Iterable[tuple[str, Rule]], met: Mapping[str, bool]) -> dict[str, Any]:
    """The record of a file's rules: pattern, target, and whether it is met, by key; plain data."""
    return {
        key: {
            "pattern": rule.model_dump(mode="json")["pattern"],
            "target": rule.target.model_dump(mode="json", exclude_none=True),
            **{name: value for name in PER_LAYER if (value := getattr(rule, name)) is not None},
            "met": met.get(key, False),
        }
        for key, rule in rules
    }


def continue_coupled(coupled: CoupledGroups, record: Mapping[str, Any]) -> None:
    """Bring rules of removable groups to where the file's were: met, or with a target for what is left.

    Args:
        coupled: the groups of the model as it is now.
        record: of the earlier pruner.
    """
    dense, kept = (int(record.get(name, 0)) for name in ("macs", "kept_macs"))
    if kept < dense:
        coupled.of = " of the model as this pruner found it"
    for one in coupled.rules:
        left = None if _same_and_met(one.key, one.given, record) else _rule_left(coupled, one, record)
        if left is None:
            one.state.phase = "finetune"
            logger.warning(MET, one.key)
        else:
            one.aim(left)


def _same_and_met(key: str, rule: Rule, record: Mapping[str, Any]) -> bool:
    mine = goals_of([(key, rule)], {key: True})[key]
    known = (record.get("rules") or {}).get(key)
    return bool(known == mine)


def _rule_left(coupled: CoupledGroups, one: CoupledRule, record: Mapping[str, Any]) -> Rule | None:
    """A rule in terms of the model as it is now; None if that meets it."""
    fractions = fractions_by_rule(one.given, coupled.model, one.grouping, coupled.set_of_layer, one.key)
    if fractions is None:
        left = _left(coupled, one, record)
        changed = {"target": left, "hold": one.given.hold if left is not None and left.lists else None}
        return None if left is None else one.given.model_copy(update=changed)
    if one.given.keep_per_layer is not None:
        return one.given if any(fractions) else None
    layers = dict[str, float]()
    for each, fraction in zip(one.grouping.sets, fractions, strict=True):
        dense, here = _widths([each], record)
        layers[each.layers[0]] = max(0.0, 1.0 - (1.0 - fraction) * dense / here)
    met = all(value <= NEAR for value in layers.values())
    return None if met else one.given.model_copy(update={"sparsity_per_layer": layers})


def _left(coupled: CoupledGroups, one: CoupledRule, record: Mapping[str, Any]) -> Target | None:
    """A rule's target in terms of the model as it is now, without members of a family that it meets; None if it meets
    all."""
    target = one.given.target
    if "latency" in target.fractions or "peak_memory" in target.fractions:
        logger.warning("%s.target: latency and memory are fractions of those of the model as it is now", one.key)
    members = [_member_left(coupled, one, member, record) for member in target.members()]
    left = [member for member in members if member is not None]
    if not left:
        return None
    return left[0].at({name: [member.numbers[name] for member in left] for name in target.lists})


def _member_left(coupled: CoupledGroups, one: CoupledRule, target: Target, record: Mapping[str, Any]) -> Target | None:
    changed = dict[str, Any]()
    if (sparsity := target.last_sparsity) is not None:
        dense, here = channels_of(coupled, one, record)
        changed["sparsity"] = 1.0 - (1.0 - sparsity) * dense / here
    costs = {"macs": coupled.macs_cost.dense, "parameters": float(coupled.dense_parameters)}
    for name, cost in costs.items():
        asked = getattr(target, name)
        if asked is not None:
            changed[name] = asked * float(record.get(name, cost)) / max(cost, 1.0)
    met = all(value <= NEAR if name == "sparsity" else value >= 1.0 - NEAR for name, value in changed.items())
    others = [name for name in ("peak_memory", "latency", "latency_ms") if getattr(target, name) is not None]
    if met and not others:
        return None
    limited = {name: min(value, 1.0) if value > 0 else None for name, value in changed.items()}
    return target.model_copy(update=limited)


def channels_of(coupled: CoupledGroups, one: CoupledRule | None, record: Mapping[str, Any]) -> tuple[int, int]:
    """Channels of the dense model and of the loaded one, in the sets of a rule, or in all."""
    return _widths(coupled.dense_sets if one is None else one.grouping.sets, record)


def _widths(sets: Iterable[GroupSet], record: Mapping[str, Any]) -> tuple[int, int]:
    known, dense, here = record.get("groups") or {}, 0, 0
    for each in sets:
        width = each.size * each.width
        dense, here = dense + max(int(known.get(each.name, (width, width))[0]), width), here + width
    return dense, here


def continue_weights(weights: WeightGroups | None, record: Mapping[str, Any]) -> None:
    """Take the zeros of a file's rules inside layers as masks; a rule with more to reach goes on from them.

    Args:
        weights: the rules of the loaded model, if there are any inside layers.
        record: what the file says.
    """
    finished, known = set(record.get("elements", ())), record.get("rules") or {}
    rules = [] if weights is None else weights.rules
    origins = _origins(rules, finished, known)
    _tell_of_lost(finished - set(origins.values()), rules)
    for one in rules:
        if one.key in origins:
            one.masks.set(~zero_groups(one.grouping))
            one.state.phase, one.state.event = "finetune", 1
            same = _same_and_met(origins[one.key], one.given, record)
            if not same and (begun := _begun(one)) is not None:
                one.state.phase, one.state.event, one.state.initial = "regularize", 0, begun
            else:
                logger.warning(MET, one.key)


def _pattern(one: WeightRule) -> Any:
    return one.rule.model_dump(mode="json")["pattern"]


def _origins(rules: Iterable[WeightRule], finished: Collection[str], known: Mapping[str, Any]) -> dict[str, str]:
    """Key of each rule -> key of the file's rule that it continues: the one of its name or position if that has the
    same pattern; else the only one with that pattern that no other rule continues.

    Args:
        rules: of the loaded model.
        finished: keys of the file's rules that have made zeros.
        known: what the file says of them.
    """
    patterns = {key: (known.get(key) or {}).get("pattern") for key in finished}
    found = {one.key: one.key for one in rules if patterns.get(one.key, "") in (None, _pattern(one))}
    for one in rules:
        alike = [key for key, pattern in patterns.items() if pattern == _pattern(one) and key not in found.values()]
        if one.key not in found and len(alike) == 1 and one.rule.mode == "prune":
            found[one.key] = alike[0]
    return {key: origin for key, origin in found.items() if origin in finished}


def _tell_of_lost(keys: Collection[str], rules: Iterable[WeightRule]) -> None:
    """Warn of rules of the file whose zeros no rule here keeps: training makes them weights again."""
    if keys and not any(one.rule.mode == "lock" or one.rule.keep_zeros for one in rules):
        logger.warning(
            "the model was pruned inside layers before, by %s, and no rule here has that name and pattern: its zeros "
            "may come back. Allowed: the same rule, or one more: {pattern: unstructured, mode: lock, nested: true}",
            ", ".join(sorted(keys)),
        )


def _begun(one: WeightRule) -> float | None:
    """Where the schedule of a rule that asks for more goes on from: the sparsity, or the part of layers' own fractions
    that each of them has; None if there is nothing left to do."""
    if one.rule.mode != "prune":
        return None
    if one.fractions is None:
        _leave_met_members(one)
        return one.sparsity if (one.rule.target.last_sparsity or 0.0) > one.sparsity + NEAR else None
    keep_G, sets = one.masks.keep_G, one.grouping.sets
    masked = [1.0 - float(keep_G[each.start : each.stop].float().mean()) for each in sets]
    asked = [(own, fraction) for own, fraction in zip(masked, one.fractions, strict=True) if fraction > 0]
    if all(fraction <= own + NEAR for own, fraction in asked):
        return None
    return min(min(own / fraction, 1.0) for own, fraction in asked)


def _leave_met_members(one: WeightRule) -> None:
    """Aim at those members of a family that the file does not meet."""
    target = one.given.target
    left = [value for value in target.lists.get("sparsity", ()) if value > one.sparsity + NEAR]
    if left:
        one.aim(one.given.model_copy(update={"target": target.at({"sparsity": left})}))
