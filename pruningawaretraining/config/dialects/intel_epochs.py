"""The older section ``weight_compression``: pruners that count epochs and name the tensors that they prune."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, field_validator

from pruningawaretraining.config.dialects.base import TAG, check_window, note, note_ignored
from pruningawaretraining.config.origin import Names
from pruningawaretraining.config.strict import Amount, Positive, Strict, UnitInterval, Whole
from pruningawaretraining.errors import ConfigError, unknown
from pruningawaretraining.schedules import ROUNDING

SECTION = "pruning.approach.weight_compression"
WEIGHT: dict[str, Any] = {"type": "weight"}
TYPES: dict[str, dict[str, Any]] = {
    "basic_magnitude": WEIGHT,
    "magnitude": WEIGHT,
    "group_lasso": WEIGHT,
    "gradient_sensitivity": {"type": "snip", "momentum": 1.0},  # the sum of |w g| over all steps
    "pattern_lock": WEIGHT,
}
"""prune_type -> criterion."""


class Parameters(Strict):
    """``parameters`` of a pruner."""

    alpha: Amount | None = Field(None, description="group_lasso: strength of the regulariser.")
    pattern: str | None = Field(None, description="Another place for pattern.")
    target: Any = Field(None, description="gradient_sensitivity: how many heads or neurons stay.")
    stride: Any = Field(None, description="gradient_sensitivity: rows of a head or neuron.")
    normalize: Any = Field(None, description="gradient_sensitivity: of heads.")
    transpose: Any = Field(None, description="gradient_sensitivity: of heads.")
    importance_inputs: Any = Field(None, description="gradient_sensitivity: of heads.")
    importance_metric: Any = Field(None, description="gradient_sensitivity: of heads.")


class EpochKeys(Strict):
    """Options of one pruner, or of all of them."""

    start_epoch: Whole | None = Field(None, description="First epoch; 0 when absent.")
    end_epoch: Whole | None = Field(None, description="Last epoch; 4 when absent.")
    initial_sparsity: UnitInterval | None = Field(None, description="Sparsity before the first epoch; 0 when absent.")
    target_sparsity: UnitInterval | None = Field(None, description="Fraction of each weight to zero; 0.97 when absent.")
    update_frequency: Positive | None = Field(None, description="Epochs between events; 1 when absent.")
    frequency: Positive | None = Field(None, description="Another name for update_frequency.")


class EpochPruner(EpochKeys):
    """One pruner."""

    prune_type: str | None = Field(None, description="basic_magnitude when absent; group_lasso, gradient_sensitivity.")
    names: list[str] | None = Field(None, description="Names of weights, * for a number; absent: all.")
    pattern: str | None = Field(None, description="tile_pattern_1x1 when absent.")
    method: str | None = Field(None, description="per_tensor when absent.")
    parameters: Parameters | None = Field(None, description="alpha of group_lasso, pattern.")

    @field_validator("method")
    @classmethod
    def _is_per_tensor(cls, value: str | None) -> str | None:
        if value not in (None, "per_tensor"):
            raise ConfigError(f"method: {value!r} is not supported. Allowed: per_tensor")
        return value


class EpochSection(EpochKeys):
    """``pruning.approach.weight_compression``."""

    pruners: list[EpochPruner] | None = Field(None, description="One pruner each, with what differs from the section.")

    @field_validator("pruners", mode="before")
    @classmethod
    def _untag(cls, values: Any) -> Any:
        if not isinstance(values, list):
            return values
        return [{k: v for k, v in one.items() if k != TAG} if isinstance(one, Mapping) else one for one in values]


PARAMETERS = {
    "group_lasso": ("alpha", "pattern"),
    "structured": ("target", "transpose", "importance_inputs"),
}
"""Kind of pruner -> what it reads of ``parameters``; the others read ``pattern``."""
WITHIN = "heads and neurons are ranked within their block, by the loss that goes with them"
UNREAD = {
    "stride": "the model says how many rows a head or neuron has",
    "normalize": WITHIN,
    "importance_metric": WITHIN,
}
"""Parameters of heads and neurons that are not read -> why."""


def epoch_rules(section: EpochSection) -> tuple[list[dict[str, Any]], list[Names]]:
    """A rule for each pruner, and what it is called in messages.

    Raises:
        ConfigError: a value that is not allowed.
    """
    if section.pruners == []:
        note(f"{SECTION}.pruners", "[] prunes nothing: the layers stay dense, as they do there")
        return [{"name": SECTION, "enabled": False}], [Names(SECTION)]
    pruners = section.pruners or [EpochPruner()]
    found = [_named(section, one, f"{SECTION}.pruners[{number}]") for number, one in enumerate(pruners)]
    rules = [_rule(section, one, names) for one, names in zip(pruners, found, strict=True)]
    _tell(section, pruners)
    return rules, found


def _named(section: EpochSection, pruner: EpochPruner, place: str) -> Names:
    """Where a pruner's keys are written: in it, before the section."""

    def key(*alike: str) -> str:
        own = next((one for one in alike if getattr(pruner, one, None) is not None), None)
        shared = next((one for one in alike if getattr(section, one, None) is not None), None)
        return f"{SECTION}.{shared}" if own is None and shared is not None else f"{place}.{own or alike[0]}"

    inner = pruner.parameters or Parameters()
    fields = {
        "start": key("start_epoch"),
        "end": key("end_epoch"),
        "every": key("update_frequency", "frequency"),
        "initial": key("initial_sparsity"),
        "target": key("target_sparsity"),
        "phases": key("update_frequency", "frequency"),
        "criterion": key("prune_type"),
        "layers": key("names"),
        "pattern": f"{place}.pattern" if inner.pattern is None else f"{place}.parameters.pattern",
        "regularizer": f"{place}.parameters.alpha",
        "keep_per_layer": f"{place}.parameters.target",
    }
    layers = layers_of_names(pruner.names, key("names"), quiet=True)
    weights = [name for name in pruner.names or () if not name.endswith(".bias")]
    return Names(place, fields, dict(zip(layers or (), dict.fromkeys(weights), strict=False)))


def _unused(pruner: EpochPruner) -> dict[str, str]:
    """Keys without effect in a pruner of this kind -> why."""
    kind = "structured" if _is_structured(pruner) else pruner.prune_type or "basic_magnitude"
    found: dict[str, str] = {}
    for key in Parameters.model_fields:
        if key not in PARAMETERS.get(kind, ("pattern",)):
            found[f"parameters.{key}"] = UNREAD.get(key, f"it is none of a pruner of this kind ({kind})")
    if kind in ("structured", "pattern_lock"):
        why = "parameters.target says how many stay" if kind == "structured" else "the zeros that are there are kept"
        found |= dict.fromkeys(("initial_sparsity", "target_sparsity", "update_frequency", "frequency"), why)
        found |= {"pattern": why} if kind == "structured" else {"end_epoch": why}
    return found


def _is_structured(pruner: EpochPruner) -> bool:
    return pruner.prune_type == "gradient_sensitivity" and bool(pruner.parameters and pruner.parameters.target)


def _tell(section: EpochSection, pruners: Sequence[EpochPruner]) -> None:
    """Say which keys have no effect: a pruner's own, and the section's where no pruner follows them."""
    unused = [_unused(one) for one in pruners]
    for number, (one, mine) in enumerate(zip(pruners, unused, strict=True)):
        inner = one.parameters or Parameters()
        given = {key for key in one.model_fields_set if getattr(one, key) is not None}
        given |= {f"parameters.{key}" for key in inner.model_fields_set if getattr(inner, key) is not None}
        for key in sorted(given & mine.keys()):
            note_ignored(f"{SECTION}.pruners[{number}].{key}", mine[key])
    for key in sorted(section.model_fields_set & unused[0].keys()):
        if all(key in mine for mine in unused):
            note_ignored(f"{SECTION}.{key}", unused[0][key])


def _rule(section: EpochSection, pruner: EpochPruner, names: Names) -> dict[str, Any]:
    start, end = (
        int(_first(0, pruner.start_epoch, section.start_epoch)),
        int(_first(4, pruner.end_epoch, section.end_epoch)),
    )
    check_window(start, end, names.key("end"), "start_epoch")
    initial = _first(0.0, pruner.initial_sparsity, section.initial_sparsity)
    target = _first(0.97, pruner.target_sparsity, section.target_sparsity)
    every = _first(1.0, pruner.update_frequency, pruner.frequency, section.update_frequency, section.frequency)
    kind = pruner.prune_type or "basic_magnitude"
    if kind not in TYPES:
        raise ConfigError(unknown(names.key("criterion"), kind, TYPES))
    parameters = pruner.parameters or Parameters()
    layers = layers_of_names(pruner.names, names.key("layers"))
    if _is_structured(pruner):
        return {"name": names.place, "start": start, "end": end, **_structured(parameters, layers, names)}
    rule = {
        "name": names.place,
        "pattern": _pattern(parameters.pattern or pruner.pattern or "1x1", names.key("pattern")),
        "layers": layers,
        "criterion": TYPES[kind],
        "scope": "local",
    }
    if kind == "pattern_lock":
        return {**rule, "mode": "lock", "start": start, "at_init": start == 0}
    rule["target"] = {"sparsity": target} if target else {}
    if kind == "group_lasso" and parameters.alpha:
        rule["regularizer"] = {"type": "block_lasso", "strength": parameters.alpha}
    elif kind == "group_lasso":
        note_ignored(names.key("criterion"), "without parameters.alpha there is no penalty: blocks go by magnitude")
    if not target and "regularizer" not in rule:
        note_ignored(names.key("target"), "0 prunes nothing: the layers stay dense")
        return {**rule, "enabled": False}
    return {**rule, **_schedule(start, end, every, initial, target, names)}


def _structured(parameters: Parameters, layers: list[str] | None, names: Names) -> dict[str, Any]:
    """``gradient_sensitivity``: so many heads, or neurons of a hidden layer, stay in every block.

    A pruner of the weights that read them (``transpose``) is part of the rule of those that make them, since coupled
    weights go together here. Heads are ranked by ``|sum of w g|``, as by the gradient of a mask on their outputs.
    """
    if parameters.transpose:
        note_ignored(names.key("layers"), "they go together with the heads or neurons that they read")
        return {"layers": layers, "enabled": False}
    heads = parameters.importance_inputs == ["head_mask"]
    keep = {"keep_per_layer": parameters.target, "scope": "local", "application": "mask"}
    return {"pattern": "head" if heads else "channel", "layers": layers, "criterion": "taylor", **keep}


def _schedule(start: int, end: int, every: float, initial: float, target: float, names: Names) -> dict[str, Any]:
    """``initial + (target - initial) (k // every) every / n`` at the k-th of n epochs."""
    count = end - start + 1
    if initial > target:
        raise ConfigError(f"{names.key('initial')}: {initial} is above target_sparsity. Allowed: at most {target}")
    if count == 1 or (initial == 0 and all(math.isclose(_part(k, every), k) for k in range(1, count + 1))):
        return {"start": start, "end": end}
    values: dict[int, float] = {}
    for k in range(1, count + 1):
        value = initial + (target - initial) * _part(k, every) / count
        if value > max(values.values(), default=0.0):
            values[start + k - 1] = value
    phases = [{"start": epoch, "end": epoch, "initial": value, "sparsity": value} for epoch, value in values.items()]
    if not phases:
        where, most = names.key("every"), f"{count} epochs. Allowed: at most {count}"
        raise ConfigError(f"{where}: {every:g} is longer than its {most}")
    last = float(phases[-1]["sparsity"])
    if last < target - 1e-9:
        note_ignored(names.key("target"), f"{target} is not reached: {every:g} does not divide {count} epochs")
    return {"phases": phases, "target": {"sparsity": last}}


def _part(epochs: int, every: float) -> float:
    """Epochs that count, of so many."""
    return math.floor(epochs / every + ROUNDING) * every


def _first(default: Any, *values: Any) -> Any:
    return next((value for value in values if value is not None), default)


def _pattern(text: str, where: str) -> str:
    """``tile_pattern_4x1`` as ``4x1``."""
    short = text.rpartition("_")[2]
    if not re.fullmatch(r"\d+x\d+", short):
        raise ConfigError(unknown(where, text, ["tile_pattern_1x1", "tile_pattern_4x1", "tile_pattern_1x2"]))
    return short


def layers_of_names(names: Sequence[str] | None, where: str, quiet: bool = False) -> list[str] | None:
    """Find the layers of named weights; a ``*`` in a name stands for a number.

    Args:
        names: of weights.
        where: the key, for messages.
        quiet: whether biases among them are not said.

    Raises:
        ConfigError: there is none but biases.
    """
    if not names:
        return None
    biases = [name for name in names if name.endswith(".bias")]
    if biases and not quiet:
        note_ignored(where, f"{', '.join(biases[:3])}: biases are not pruned")
    weights = [name for name in dict.fromkeys(names) if name not in biases]
    if not weights:
        raise ConfigError(f"{where}: {names!r} has only biases. Allowed: names of weights")
    found = []
    for name in weights:
        layer = name.removesuffix(".weight")
        found.append("re:" + re.escape(layer).replace(r"\*", r"\d+") if "*" in layer else layer)
    return found
