"""Sparsities that the events of a config reach in a model, in whole groups: without training, by its weights' sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from torch import nn

from pruningawaretraining.config.options import type_of
from pruningawaretraining.config.schema import PruningConfig, Rule
from pruningawaretraining.engine.rule import ActiveRule
from pruningawaretraining.session.pruning import Pruning

FOLLOWED = ("frozen", "alternate")
"""Dynamics whose events need no training."""


def reached_sparsities(
    model: nn.Module,
    config: PruningConfig,
    inputs: Any,
    ticks: Mapping[int, Sequence[int]],
    parts: Mapping[int, int | None],
) -> dict[int, dict[int, float]]:
    """The sparsity that each event leaves: how many groups go does not depend on what scores them.

    Args:
        model: dense; only a copy is pruned.
        config: which rules.
        inputs: example inputs.
        ticks: number of a rule -> epochs or steps of the events to look at.
        parts: number of a rule -> steps of an epoch, for events at fractions of epochs.

    Returns:
        Number of a rule -> tick -> sparsity; rules whose events need training, or that share their groups with others,
        are left out.
    """
    rules = [_plain(rule) for rule in config.rules]
    wanted = {number: set(ticks[number]) for number in ticks if _is_followed(config.rules[number])}
    changes = {"rules": rules, "infer": False, "distillation": None}
    pruner = Pruning(deepcopy(model), config.model_copy(update=changes), example_inputs=inputs)
    numbers = {rule.name or f"rules[{number}]": number for number, rule in enumerate(rules)}
    for one in pruner.engine.rules:
        one.count(parts.get(numbers[one.key]))
    found: dict[int, dict[int, float]] = {}
    _note(pruner, numbers, wanted, found)  # what went at init
    for number in sorted(wanted):
        for now in ticks[number]:
            for one in [one for one in pruner.engine.rules if numbers[one.key] == number]:
                pruner.engine.tick(one.times.counts, now)
                _note(pruner, numbers, wanted, found)
    return found


def _note(
    pruner: Pruning, numbers: Mapping[str, int], wanted: Mapping[int, set[int]], found: dict[int, dict[int, float]]
) -> None:
    """Add what the rules have reached whose last event is one that is wanted."""
    for domain in pruner.engine.domains:
        for one in domain.rules:
            number, now, value = numbers[one.key], one.state.last, _sparsity(domain, one)
            if now in wanted.get(number, ()) and value is not None:
                found.setdefault(number, {}).setdefault(now, value)


def _is_followed(rule: Rule) -> bool:
    return type_of("dynamic", rule.dynamic) in FOLLOWED


def _plain(rule: Rule) -> Rule:
    """The rule with the same counts, and nothing that has to see training."""
    dynamic = rule.dynamic if _is_followed(rule) else "frozen"
    changes = {"criterion": "magnitude", "dynamic": dynamic, "regularizer": None, "compensation": "none"}
    aims = rule.aims or rule.mode != "prune"
    return rule.model_copy(update={**changes, "stable": None, "progressive": 1, "enabled": rule.enabled and aims})


def _sparsity(domain: Any, one: ActiveRule) -> float | None:
    """Of one rule; None where several share groups that can be removed."""
    if not domain.removable:
        return float(one.sparsity)  # type: ignore[attr-defined]
    return float(domain.sparsity) if len(domain.rules) == 1 else None
