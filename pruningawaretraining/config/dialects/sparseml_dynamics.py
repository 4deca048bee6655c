"""Modifiers whose masks change: AC/DC and RigL, as rules with a dynamic."""

from __future__ import annotations

from typing import Any

from pruningawaretraining.config.dialects import sparseml_keys as keys
from pruningawaretraining.config.dialects.sparseml_criteria import MAGNITUDE
from pruningawaretraining.config.dialects.sparseml_recipe import Found

LAYERS = {"erdos_renyi_kernel": "erk", "uniform": "uniform"}


def dynamic_rule(one: Found, layers: list[str] | None) -> dict[str, Any] | None:
    """The rule of a modifier with a dynamic; None for any other.

    Args:
        one: the modifier.
        layers: entries of its parameters.
    """
    modifier = one.modifier
    common = {"name": one.where, "pattern": "unstructured", "layers": layers, "exclude": [], "criterion": MAGNITUDE}
    start = max(0.0, modifier.start_epoch) + one.offset
    end = max(start, modifier.end_epoch + one.offset)
    if isinstance(modifier, keys.RegrowingPruning):
        return {
            **common,
            "dynamic": {
                "type": "regrow",
                "by": "gradient",
                "fraction": modifier.init_update_fraction,
                "layers": LAYERS[modifier.sparsity_strategy],
            },
            "scope": "local",
            "schedule": "one_shot",
            **{"start": start, "end": end, "every": modifier.update_frequency},
            "target": {"sparsity": modifier.final_sparsity},
        }
    if not isinstance(modifier, keys.AlternatingPruning):
        return None
    length = modifier.update_frequency
    first = start if end - length <= start else start + length
    return {  # phase 0 is dense, 1 sparse, and so on; the last before the end is sparse for good
        **common,
        "dynamic": "alternate",
        "scope": "global" if modifier.global_sparsity else "local",
        "schedule": "one_shot",
        **{"start": first, "end": max(first, end - length), "every": length},
        "target": {"sparsity": modifier.compression_sparsity},
    }
