"""Modifiers whose masks change: AC/DC and RigL, as rules with a dynamic."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

from pruningawaretraining.config.dialects import sparseml_keys as keys
from pruningawaretraining.config.dialects.base import note_ignored
from pruningawaretraining.config.dialects.sparseml_criteria import MAGNITUDE, pattern_of
from pruningawaretraining.config.dialects.sparseml_recipe import Found
from pruningawaretraining.errors import ConfigError

LAYERS = {"erdos_renyi_kernel": "erk", "uniform": "uniform"}


def dynamic_rule(
    one: Found, modifier: keys.AlternatingPruning | keys.RegrowingPruning, layers: list[str] | None
) -> dict[str, Any]:
    """The rule of a modifier with a dynamic.

    Args:
        one: the modifier in its recipe.
        modifier: its keys.
        layers: entries of its parameters.

    Raises:
        ConfigError: phases that do not fit between its start and its end.
    """
    common = {"name": one.where, "layers": layers, "exclude": [], "criterion": MAGNITUDE}
    start = max(0.0, modifier.start_epoch) + one.offset
    end = max(start, modifier.end_epoch + one.offset)
    if isinstance(modifier, keys.RegrowingPruning):
        return {**common, **_regrowing(modifier), "start": start, "end": end}
    return {**common, **_alternating(one, modifier, start, end)}


def _regrowing(modifier: keys.RegrowingPruning) -> dict[str, Any]:
    strategy = LAYERS[modifier.sparsity_strategy]
    return {
        "pattern": "unstructured",
        "dynamic": {
            "type": "regrow", "by": "gradient", "fraction": modifier.init_update_fraction, "layers": strategy
        },
        "scope": "local",
        "schedule": "one_shot",
        "every": modifier.update_frequency,
        "target": {"sparsity": modifier.final_sparsity},
    }  # fmt: skip


def _alternating(one: Found, modifier: keys.AlternatingPruning, start: float, end: float) -> dict[str, Any]:
    pattern, final = pattern_of(one, modifier, modifier.compression_sparsity)
    is_global = modifier.global_sparsity
    if isinstance(modifier, keys.CapAlternating):
        moments = _cap_moments(one, modifier, start, end)
        is_global = one.name == "ACDC_GlobalMagnitudePruningModifier"
        if "global_sparsity" in modifier.model_fields_set and modifier.global_sparsity != is_global:
            note_ignored(one.key("global_sparsity"), f"{one.name} decides")
    else:
        moments = _moments(start, end, modifier.update_frequency)
    return {
        "pattern": pattern["type"] if len(pattern) == 1 else pattern,
        "dynamic": "alternate",
        "scope": "global" if is_global else "local",
        "target": {"sparsity": final},
        **_schedule(moments, final),
    }


def _moments(start: float, end: float, length: float) -> list[float]:
    """Where SparseML's phases begin, from the first sparse one on.

    Phase 0 is dense, 1 sparse, and so on; the last before the end is sparse for good.
    """
    first = start if end - length <= start else start + length
    last = max(first, end - length)
    return [first + number * length for number in range(int((last - first) / length) + 1)]


def _cap_moments(one: Found, modifier: keys.CapAlternating, start: float, end: float) -> list[float]:
    """Where the phases of CAP's version begin: phase 0 is sparse, 1 dense, and so on; the last three are as long as
    ``update_frequency``, ``last_decompression_epochs`` and ``last_compression_epochs``.

    Raises:
        ConfigError: no room for two regular phases and the last three, or a phase without any epoch.
    """
    length = modifier.update_frequency
    last_dense, last_sparse = modifier.last_decompression_epochs or length, modifier.last_compression_epochs or length
    dense = round(2 * modifier.dense_fraction * length)
    if not 0 < dense < 2 * length:
        raise ConfigError(f"{one.key('dense_fraction')}: {modifier.dense_fraction} leaves a phase without any epoch")
    least = 3 * length + last_dense + last_sparse
    regular = int((end - start - least) // (2 * length)) + 1
    if regular < 1:
        allowed = f"Allowed: {start + least:g} or later"
        raise ConfigError(f"{one.key('end_epoch')}: {modifier.end_epoch:g} leaves no room for its phases. {allowed}")
    lengths = [2 * length - dense, dense] * regular + [length, last_dense, last_sparse]
    *moments, over = accumulate(lengths, initial=start)
    if over < end:
        note_ignored(one.key("end_epoch"), f"the last sparse phase goes on at {over:g}, where CAP would train dense")
    return moments


def _schedule(moments: list[float], final: float) -> dict[str, Any]:
    """Events at the given moments, as one schedule where they are evenly spaced."""
    steps = {after - before for before, after in pairwise(moments)} or {1.0}
    if len(steps) == 1:
        return {"schedule": "one_shot", "start": moments[0], "end": moments[-1], "every": steps.pop()}
    phase = {"schedule": "one_shot", "every": 1, "sparsity": final}
    return {"phases": [{**phase, "start": moment, "end": moment} for moment in moments]}
