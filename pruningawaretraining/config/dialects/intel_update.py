"""Changes the settings of all rules at once, by the names of step-wise pattern pruning or by our own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pruningawaretraining.config.dialects.base import check_window, schedule_name
from pruningawaretraining.config.dialects.intel import DEFAULTS, pruner_criterion, pruner_pattern, step_window
from pruningawaretraining.config.dialects.intel_keys import EXCLUDING, SAME
from pruningawaretraining.config.dialects.intel_names import written
from pruningawaretraining.config.origin import in_users_words
from pruningawaretraining.config.schema import PruningConfig, Rule
from pruningawaretraining.errors import ConfigError, unknown

PLAIN = {
    "start_step": "start",
    "end_step": "end",
    "pruning_frequency": "every",
    "pruning_scope": "scope",
    "max_sparsity_ratio_per_op": "max_sparsity",
    "min_sparsity_ratio_per_op": "min_sparsity",
    "resume_from_pruned_checkpoint": "keep_zeros",
}
"""Key of 2.x -> field of a rule."""

CRITERION = ("pruning_type", "criterion_reduce_type", "low_memory_usage")
OTHERS = ("target_sparsity", "sparsity_decay_type", "pattern", "op_names", "reg_coeff", *CRITERION)
DISTILL = "distill_loss_weight"
"""Of the config as a whole, not of its rules."""
FIELDS = tuple(field for field in Rule.model_fields if field not in ("name", "pattern"))


def updated(config: PruningConfig, items: Mapping[str, Any]) -> PruningConfig:
    """A config with settings changed in every rule.

    Args:
        config: stays as it is.
        items: keys of step-wise pattern pruning, of 2022 or 2.x, or fields of a rule.

    Raises:
        ConfigError: an unknown key, or a value that is not allowed.
    """
    items = dict(items)
    whole = config.model_dump()
    if DISTILL in items:
        weight = items.pop(DISTILL)
        whole["distillation"] = {**(whole["distillation"] or {}), "weight": weight} if weight else None
    renamed = {SAME.get(key, "excluded_op_names" if key in EXCLUDING else key): value for key, value in items.items()}
    for key in renamed:
        if key not in (*PLAIN, *OTHERS, *FIELDS, "excluded_op_names"):
            raise ConfigError(unknown("update", key, [*PLAIN, *SAME, *OTHERS, *FIELDS, *EXCLUDING, DISTILL]))
    rules = [_changed(rule.model_dump(), renamed) for rule in config.rules]
    with in_users_words(config.origin):
        found = PruningConfig.model_validate({**whole, "rules": rules})
    listed = [entry for key in ("op_names", "excluded_op_names") for entry in renamed.get(key) or ()]
    found.follow(config, written(listed))
    return found


def _changed(rule: dict[str, Any], items: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in items.items():
        if key in PLAIN or (key in FIELDS and key != "target"):
            rule[PLAIN.get(key, key)] = value
    for name in ("start_step", "end_step", "pruning_frequency"):
        if name in items and (isinstance(items[name], bool) or not isinstance(items[name], int)):
            raise ConfigError(f"update: {name}: {items[name]!r} is not allowed. Allowed: a whole number")
    if "end_step" in items or "start_step" in items:
        check_window(rule["start"], rule["end"], "end_step", "start_step")
    if rule["initial"] is not None and any(key in items for key in ("start_step", "end_step", "pruning_frequency")):
        rule |= step_window(rule["start"], rule["end"], rule["every"])
    if "target_sparsity" in items:
        rule["target"] = {**rule["target"], "sparsity": items["target_sparsity"]}
    if "target" in items:
        rule["target"] = items["target"]
    if "sparsity_decay_type" in items:
        rule["schedule"] = schedule_name(items["sparsity_decay_type"], "sparsity_decay_type")
    if "pattern" in items:
        rule["pattern"] = _pattern(rule["pattern"], items["pattern"])
    if any(key in items for key in CRITERION):
        rule["criterion"] = _criterion(rule["criterion"], items)
    if "reg_coeff" in items:
        strength = items["reg_coeff"]
        rule["regularizer"] = {"type": "block_lasso", "strength": strength} if strength else None
    for key, field in (("op_names", "layers"), ("excluded_op_names", "exclude")):
        if key in items:
            entries = [f"{'?' * (field == 'exclude')}re:.*(?:{entry}).*" for entry in items[key]]
            rule[field] = entries or (None if field == "layers" else [])
    return rule


def _pattern(before: Any, value: Any) -> Any:
    """Another pattern for the same classes of layers."""
    if not isinstance(value, str) or not isinstance(before, Mapping) or "types" not in before:
        return value
    known = {"pruning_op_types": before["types"], "spare_last": before.get("spare_last", False)}
    return pruner_pattern({"pattern": value, **known}, "update.pattern")


def _criterion(before: Any, items: Mapping[str, Any]) -> Any:
    known = before if isinstance(before, Mapping) else {"type": before}
    values = {
        **DEFAULTS,
        "pruning_type": known["type"] if known["type"] != "weight" else "magnitude",
        "criterion_reduce_type": known.get("reduction", DEFAULTS["criterion_reduce_type"]),
        "low_memory_usage": known.get("half", False),
    }
    return pruner_criterion({**values, **{key: items[key] for key in CRITERION if key in items}}, "update.pruning_type")
