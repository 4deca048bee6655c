"""What the events of a config come to in a model, in whole groups: without training, by the sizes of its weights."""

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
    followed = {number for number in ticks if type_of("dynamic", config.rules[number].dynamic) in FOLLOWED}
    changes = {"rules": rules, "infer": False, "distillation": None}
    pruner = Pruning(deepcopy(model), config.model_copy(update=changes), example_inputs=inputs)
    engine = pruner.engine
    known = {rule.name or f"rules[{number}]": number for number, rule in enumerate(rules)}
    for one in engine.rules:
        one.count(parts.get(known[one.key]))
    found: dict[int, dict[int, float]] = {number: {} for number in followed}

    def look() -> None:
        for domain in engine.domains:
            for one in domain.rules:
                number, now = known[one.key], one.state.last
                if number in followed and now in ticks[number]:
                    value = _sparsity(domain, one)
                    if value is not None:
                        found[number].setdefault(now, value)

    look()  # at init
    for number in sorted(followed):
        for now in ticks[number]:
            active = next((one for one in engine.rules if known[one.key] == number), None)
            if active is not None:
                engine.tick(active.times.counts, now)
                look()
    return {number: values for number, values in found.items() if values}


def _plain(rule: Rule) -> Rule:
    """The rule with the same counts, and nothing that has to see training."""
    dynamic = rule.dynamic if type_of("dynamic", rule.dynamic) in FOLLOWED else "frozen"
    changes = {"criterion": "magnitude", "dynamic": dynamic, "regularizer": None, "compensation": "none"}
    aims = rule.aims or rule.mode != "prune"
    return rule.model_copy(update={**changes, "stable": None, "progressive": 1, "enabled": rule.enabled and aims})


def _sparsity(domain: Any, one: ActiveRule) -> float | None:
    """Of one rule; None where several share groups that can be removed."""
    if not domain.removable:
        return float(one.sparsity)  # type: ignore[attr-defined]
    return float(domain.sparsity) if len(domain.rules) == 1 else None
