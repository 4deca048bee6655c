"""Registered costs: a cost of its own for every layer, which masks scale as they scale its MACs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from torch import nn

from pruningawaretraining.costs.own import own_macs
from pruningawaretraining.registry import calling, check_returned

LayerCost = Callable[[str, nn.Module, float], float]
"""A registered cost: name, module and own MACs of a layer -> its cost, which masks scale as they scale its MACs."""


def weighted(model: nn.Module, per_layer: Mapping[str, float], cost: LayerCost) -> dict[str, float]:
    """The cost of every module, its children included, where each layer has a cost of its own.

    Layers are the modules with parameters or MACs of their own, apart from those of their children; containers without
    any are not asked.

    Raises:
        ExtensionError: the cost raises, or is not a finite number of 0 or more.
    """
    found = dict.fromkeys(per_layer, 0.0)
    for name, module in model.named_modules():
        macs = own_macs(name, per_layer)
        if not macs and next(module.parameters(recurse=False), None) is None:
            continue
        expected = f"a finite number of 0 or more for {name or 'the model'!r}"
        with calling("cost", cost, expected):
            given: Any = cost(name, module, macs)
        number = isinstance(given, Real) and not isinstance(given, bool)
        check_returned(number and 0 <= given < math.inf, "cost", cost, given, expected)
        value = float(given)
        parts = name.split(".") if name else []
        for depth in range(len(parts) + 1):
            parent = ".".join(parts[:depth])
            found[parent] = found.get(parent, 0.0) + value
    return found
