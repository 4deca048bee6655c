"""A recipe in full: what it prunes, how long it trains, and its learning rate at every moment."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pruningawaretraining.config.dialects.sparseml import SparseMl, config_of
from pruningawaretraining.config.dialects.sparseml_keys import (
    Modifier,
    Pruning,
    Quantization,
    RateFunction,
    RateSchedule,
    SetRate,
)
from pruningawaretraining.config.dialects.sparseml_recipe import Found, is_cap, modifiers_of
from pruningawaretraining.config.extent import check_extent
from pruningawaretraining.config.load import find_file, placed, read_mapping, with_variables
from pruningawaretraining.config.rates import LearningRates
from pruningawaretraining.config.schema import PruningConfig
from pruningawaretraining.errors import ConfigError


@dataclass(frozen=True)
class Quantized:
    """From when on a recipe trains with quantization; the loop does it, see docs/quantization.md.

    Args:
        start: the epoch.
        freeze_ranges: epoch at which observers stop; None: never.
        freeze_norms: epoch at which the statistics of batch norms stop; None: never.
    """

    start: float
    freeze_ranges: float | None
    freeze_norms: float | None


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe.

    Args:
        pruning: its pruning modifiers as rules.
        rates: its learning rates.
        epochs: how long it trains: the end of its last modifier, an epoch range among them.
        quantized: from when on it trains with quantization; None: never.
    """

    pruning: PruningConfig
    rates: LearningRates
    epochs: int
    quantized: Quantized | None = None


def is_recipe(source: Any) -> bool:
    """Whether a mapping, or the YAML file at a path, is a SparseML-style recipe."""
    if isinstance(source, str) and source.lower().endswith((".yaml", ".yml", ".md")):
        source = read_mapping(find_file(source))
    return isinstance(source, Mapping) and SparseMl().recognises(source)


def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any], variables: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a SparseML-style recipe.

    Args:
        source: a .yaml file, a .md file that begins with one, or what one holds (tags under ``"!tag"``).
        variables: values for the names in ``eval(...)``, before those of the recipe.

    Raises:
        ConfigError: not a recipe, or a modifier, key or value that is not allowed.
    """
    if isinstance(source, Mapping):
        return _recipe(with_variables(source, variables))
    path = find_file(source)
    mapping = with_variables(read_mapping(path), variables)
    with placed(path):
        return _recipe(mapping)


def _recipe(mapping: Mapping[str, Any]) -> Recipe:
    if not SparseMl().recognises(mapping):
        raise ConfigError(
            f"recipe: no list of modifiers among {sorted(mapping)}. Allowed: 'modifiers', or '..._modifiers'"
        )
    check_extent(mapping)
    found = modifiers_of(mapping)
    modifiers = [one.modifier for one in found]
    rates = tuple(one for one in modifiers if isinstance(one, (SetRate, RateFunction, RateSchedule)))
    return Recipe(config_of(found), LearningRates(rates, is_cap(found)), _epochs(found), _quantized(modifiers))


def _epochs(found: list[Found]) -> int:
    ends = [
        max(one.modifier.end_epoch, one.modifier.start_epoch + isinstance(one.modifier, Pruning)) + one.offset
        for one in found
    ]
    return max(1, math.ceil(max(ends, default=1)))


def _quantized(modifiers: list[Modifier]) -> Quantized | None:
    for one in modifiers:
        if isinstance(one, Quantization):
            start = max(one.start_epoch, 0.0)
            return Quantized(start, one.disable_quantization_observer_epoch, one.freeze_bn_stats_epoch)
    return None
