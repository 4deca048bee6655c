"""A recipe in full: what it prunes, how long it trains, and its learning rate at every moment."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pruningawaretraining.config.dialects.sparseml import SparseMl, modifiers_of
from pruningawaretraining.config.dialects.sparseml_keys import EpochRange, Modifier, Pruning, RateFunction, SetRate
from pruningawaretraining.config.load import find_file, load_config, read_mapping
from pruningawaretraining.config.schema import PruningConfig
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.registry import lookup, register

Curve = Callable[[float, float, float, float], float]


@register("rate", "linear")
def linear(epoch: float, length: float, first: float, last: float) -> float:
    """``first`` to ``last`` in a straight line over ``length`` epochs."""
    return first + (last - first) * min(epoch / length, 1.0) if length else last


@register("rate", "cosine")
def cosine(epoch: float, length: float, first: float, last: float) -> float:
    """``last + (first - last) (1 + cos(pi t)) / 2``."""
    t = min(epoch / length, 1.0) if length else 1.0
    return last + (first - last) * (1 + math.cos(math.pi * t)) / 2


@dataclass(frozen=True)
class LearningRates:
    """The learning rate modifiers of a recipe.

    Args:
        modifiers: in its order.

    Raises:
        ConfigError: a cycle of no length.
    """

    modifiers: tuple[SetRate | RateFunction, ...] = ()

    def __post_init__(self) -> None:
        for one in self.modifiers:
            if isinstance(one, RateFunction) and one.lr_func == "cyclic_linear" and one.cycle_epochs <= 0:
                raise ConfigError(f"recipe: cycle_epochs: {one.cycle_epochs} is not allowed. Allowed: above 0")

    def at(self, epoch: float) -> float | None:
        """The learning rate at a moment.

        Args:
            epoch: epochs that have passed, with the part of the current one.

        Returns:
            That of the modifier that has begun last, or None before the first: the optimizer's own.
        """
        begun = [one for one in self.modifiers if one.start_epoch <= epoch]
        if not begun:
            return None
        last = max(enumerate(begun), key=lambda pair: (pair[1].start_epoch, pair[0]))[1]
        return last.learning_rate if isinstance(last, SetRate) else _along(last, epoch)

    def apply(self, optimizer: Any, epoch: float) -> float | None:
        """Give every parameter group of an optimizer the rate of a moment, if there is one; returns it."""
        rate = self.at(epoch)
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate
        return rate


def _along(one: RateFunction, epoch: float) -> float:
    start = max(one.start_epoch, 0.0)
    length = max(one.end_epoch - start, 0.0)
    passed = min(max(epoch - start, 0.0), length)
    if one.lr_func != "cyclic_linear":
        curve: Curve = lookup("rate", one.lr_func)
        return curve(passed, length, one.init_lr, one.final_lr)
    if epoch >= one.end_epoch:
        return one.final_lr
    return linear(math.fmod(passed, one.cycle_epochs), one.cycle_epochs, one.init_lr, one.final_lr)


@dataclass(frozen=True)
class Recipe:
    """What a recipe says.

    Args:
        pruning: its pruning modifiers as rules.
        rates: its learning rates.
        epochs: how long it trains: the end of its epoch range, or of its last modifier.
    """

    pruning: PruningConfig
    rates: LearningRates
    epochs: int


def is_recipe(source: Any) -> bool:
    """Whether a mapping, or the YAML file at a path, is a SparseML-style recipe."""
    if isinstance(source, str) and source.lower().endswith((".yaml", ".yml")):
        source = read_mapping(find_file(source))
    return isinstance(source, Mapping) and SparseMl().recognises(source)


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
    """Read a SparseML-style recipe.

    Args:
        source: a .yaml file, or what one holds (tags under ``"!tag"``).

    Raises:
        ConfigError: it is no such recipe, or has a modifier, key or value that is not allowed.
    """
    mapping = source if isinstance(source, Mapping) else read_mapping(find_file(source))
    if not SparseMl().recognises(mapping):
        raise ConfigError(
            f"recipe: no list of modifiers among {sorted(mapping)}. Allowed: 'modifiers', or '..._modifiers'"
        )
    found = [modifier for _, _, modifier in modifiers_of(mapping)]
    rates = tuple(one for one in found if isinstance(one, (SetRate, RateFunction)))
    return Recipe(load_config(source), LearningRates(rates), _epochs(found))


def _epochs(modifiers: list[Modifier]) -> int:
    ranges = [one.end_epoch for one in modifiers if isinstance(one, EpochRange)]
    ends = ranges or [max(one.end_epoch, one.start_epoch + isinstance(one, Pruning)) for one in modifiers]
    return max(1, math.ceil(max(ends, default=1)))
