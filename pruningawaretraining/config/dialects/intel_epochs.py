"""The older section ``weight_compression``: pruners that count epochs and name the tensors that they prune."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, field_validator

from pruningawaretraining.config.dialects.base import TAG, check_window, note_ignored
from pruningawaretraining.config.strict import Amount, Positive, Strict, UnitInterval, Whole
from pruningawaretraining.errors import ConfigError, unknown

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


def epoch_rules(section: EpochSection) -> list[dict[str, Any]]:
    """A rule for each pruner.

    Raises:
        ConfigError: a value that is not allowed.
    """
    pruners = section.pruners or [EpochPruner()]
    return [_rule(section, one, f"{SECTION}.pruners[{number}]") for number, one in enumerate(pruners)]


def _rule(section: EpochSection, pruner: EpochPruner, name: str) -> dict[str, Any]:
    start, end = (
        int(_first(0, pruner.start_epoch, section.start_epoch)),
        int(_first(4, pruner.end_epoch, section.end_epoch)),
    )
    check_window(start, end, f"{name}.end_epoch", "start_epoch")
    initial = _first(0.0, pruner.initial_sparsity, section.initial_sparsity)
    target = _first(0.97, pruner.target_sparsity, section.target_sparsity)
    every = _first(1.0, pruner.update_frequency, pruner.frequency, section.update_frequency, section.frequency)
    kind = pruner.prune_type or "basic_magnitude"
    if kind not in TYPES:
        raise ConfigError(unknown(f"{name}.prune_type", kind, TYPES))
    parameters = pruner.parameters or Parameters()
    if parameters.target is not None:
        return {"name": name, "start": start, "end": end, **_structured(pruner, parameters, name)}
    rule = {
        "name": name,
        "pattern": _pattern(parameters.pattern or pruner.pattern or "1x1", name),
        "layers": layers_of_names(pruner.names, name),
        "criterion": TYPES[kind],
        "scope": "local",
    }
    if kind == "pattern_lock":
        return {**rule, "mode": "lock", "start": start, "at_init": start == 0}
    rule["target"] = {"sparsity": target} if target else {}
    if kind == "group_lasso" and parameters.alpha:
        rule["regularizer"] = {"type": "block_lasso", "strength": parameters.alpha}
    if not target and "regularizer" not in rule:
        return {**rule, "enabled": False}
    return {**rule, **_schedule(start, end, max(1, int(every)), initial, target, name)}


def _structured(pruner: EpochPruner, parameters: Parameters, name: str) -> dict[str, Any]:
    """``gradient_sensitivity``: so many heads, or neurons of a hidden layer, stay in every block.

    A pruner of the weights that read them (``transpose``) is part of the rule of those that make them, since coupled
    weights go together here. Heads are ranked by ``|sum of w g|``, as by the gradient of a mask on their outputs.
    """
    layers = layers_of_names(pruner.names, name)
    if parameters.transpose:
        note_ignored(f"{name}.names", "they go together with the heads or neurons that they read")
        return {"layers": layers, "enabled": False}
    heads = parameters.importance_inputs == ["head_mask"]
    keep = {"keep_per_layer": parameters.target, "scope": "local", "application": "mask"}
    return {"pattern": "head" if heads else "channel", "layers": layers, "criterion": "taylor", **keep}


def _schedule(start: int, end: int, every: int, initial: float, target: float, name: str) -> dict[str, Any]:
    """``initial + (target - initial) (k // every) every / n`` at the k-th of n epochs."""
    count = end - start + 1
    if every == 1 and initial == 0:
        return {"start": start, "end": end}
    if count == 1:
        return {"start": start, "end": end}
    values = {
        start + k - 1: initial + (target - initial) * (k // every) * every / count
        for k in range(1, count + 1)
        if k % every == 0 or (k == 1 and initial > 0)
    }
    phases = [
        {"start": epoch, "end": epoch, "initial": value, "sparsity": value} for epoch, value in values.items() if value
    ]
    if not phases:
        raise ConfigError(
            f"{name}.update_frequency: {every} is longer than its {count} epochs. Allowed: at most {count}"
        )
    last = float(phases[-1]["sparsity"])
    if last < target - 1e-9:
        note_ignored(f"{name}.target_sparsity", f"{target} is not reached: {every} does not divide {count} epochs")
    return {"phases": phases, "target": {"sparsity": last}}


def _first(default: Any, *values: Any) -> Any:
    return next((value for value in values if value is not None), default)


def _pattern(text: str, name: str) -> str:
    """``tile_pattern_4x1`` as ``4x1``."""
    short = text.rpartition("_")[2]
    if not re.fullmatch(r"\d+x\d+", short):
        raise ConfigError(
            unknown(f"{name}.pattern", text, ["tile_pattern_1x1", "tile_pattern_4x1", "tile_pattern_1x2"])
        )
    return short


def layers_of_names(names: Sequence[str] | None, where: str) -> list[str] | None:
    """Layers from names of weights; a ``*`` in them is a number.

    Raises:
        ConfigError: there is none but biases.
    """
    if not names:
        return None
    biases = [name for name in names if name.endswith(".bias")]
    if biases:
        note_ignored(f"{where}.names", f"{', '.join(biases[:3])}: biases are not pruned")
    weights = [name for name in dict.fromkeys(names) if name not in biases]
    if not weights:
        raise ConfigError(f"{where}.names: {names!r} has only biases. Allowed: names of weights")
    found = []
    for name in weights:
        layer = name.removesuffix(".weight")
        found.append("re:" + re.escape(layer).replace(r"\*", r"\d+") if "*" in layer else layer)
    return found
