"""Fractions of single layers as limits of an allocation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from pruningawaretraining.allocation.ranking import Limits, limits_of
from pruningawaretraining.config.schema import Rule
from pruningawaretraining.errors import ConfigError, unknown
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.patterns.selection import select


def fractions_of(
    model: nn.Module, grouping: Grouping, set_of: Mapping[str, str], given: Mapping[str, float], key: str
) -> tuple[float, ...]:
    """The fraction of each set.

    Args:
        model: the model.
        grouping: the rule's groups.
        set_of: layer that loses groups -> name of its set.
        given: entries as in a rule's ``layers`` -> fraction.
        key: of the rule, for messages.

    Raises:
        ConfigError: an entry that names no layer of the rule, or two that name one set.
    """
    where = f"{key}.sparsity_per_layer"
    number_of = {one.name: number for number, one in enumerate(grouping.sets)}
    layers = {layer: number_of[name] for layer, name in set_of.items() if name in number_of}
    chosen: dict[int, tuple[str, float]] = {}
    for entry, fraction in given.items():
        numbers = {layers[layer] for layer in select(model, [entry], layers, where)}
        if not numbers:
            raise ConfigError(unknown(where, entry, layers))
        for number in numbers:
            other, theirs = chosen.setdefault(number, (entry, fraction))
            if theirs != fraction:
                name = grouping.sets[number].name
                raise ConfigError(
                    f"{where}: {entry!r} and {other!r} are coupled by {name!r}. Allowed: the same fraction"
                )
    return tuple(chosen.get(number, ("", 0.0))[1] for number in range(len(grouping.sets)))


def without_all_but(grouping: Grouping, keep: int) -> tuple[float, ...]:
    """The fraction of each set that goes where so many groups stay; smaller sets stay whole."""
    return tuple(max(0.0, 1 - keep / one.size) for one in grouping.sets)


def fractions_by_rule(
    rule: Rule, model: nn.Module, grouping: Grouping, set_of: Mapping[str, str], key: str
) -> tuple[float, ...] | None:
    """The fraction of each set that a rule gives one by one; None where it has a target.

    Args:
        rule: the rule.
        model, grouping, set_of, key: see :func:`fractions_of`.

    Raises:
        ConfigError: see there; or more than ``max_sparsity_from`` lets go.
    """
    keep, given = rule.keep_per_layer, rule.sparsity_per_layer
    if keep is not None:
        found = without_all_but(grouping, keep)
    elif given is not None:
        found = fractions_of(model, grouping, set_of, given, key)
    else:
        return None
    caps = limits_of(rule).caps
    for one, fraction in zip(grouping.sets, found, strict=True):
        most = caps.get(one.name, 1.0)
        if fraction > most:
            what = f"{fraction:g} of {one.name!r}"
            if keep is not None:
                what = f"{keep} of {one.name!r}, without {fraction:g} of it,"
            where = f"{key}.{'sparsity_per_layer' if keep is None else 'keep_per_layer'}"
            raise ConfigError(
                f"{where}: {what} does not go with max_sparsity_from: {most:g}. Allowed: at most {most:g}"
            )
    return found


def limited(limits: Limits, fractions: tuple[float, ...], part: float) -> Limits:
    """Limits that let exactly a part of the fractions go."""
    return replace(limits, per_set=tuple((part * one, part * one) for one in fractions))
