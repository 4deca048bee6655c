"""Step-wise pattern pruning: the YAML of 2022 with its ``!Pruner`` tags, and the flat form of 2.x."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pruningawaretraining.config.dialects.base import check_window, native, note_ignored, schedule_name
from pruningawaretraining.config.dialects.intel_epochs import epoch_rules
from pruningawaretraining.config.dialects.intel_keys import (
    EXCLUDED,
    TAG_OF_PRUNERS,
    File2022,
    FileKeys,
    Flat2x,
    PrunerKeys,
)
from pruningawaretraining.config.schema import PruningConfig
from pruningawaretraining.errors import ConfigError, unknown
from pruningawaretraining.registry import canonical, names, register, spelled

DEFAULTS: dict[str, Any] = {
    "start_step": 0,
    "end_step": 0,
    "target_sparsity": 0.9,
    "pruning_type": "snip_momentum",
    "pattern": "4x1",
    "op_names": [],
    "excluded_op_names": [],
    "pruning_op_types": ["Conv", "Linear"],
    "pruning_scope": "global",
    "pruning_frequency": 1,
    "max_sparsity_ratio_per_op": 0.98,
    "min_sparsity_ratio_per_op": 0.0,
    "sparsity_decay_type": "exp",
    "criterion_reduce_type": "mean",
    "reg_type": "none",
    "reg_coeff": 0.0,
    "low_memory_usage": False,
    "resume_from_pruned_checkpoint": False,
}

REDUCED = {"magnitude": "weight", "gradient": "gradient", "snip": "snip", "snip_momentum": "snip_momentum"}
"""pruning_type -> criterion, of those that reduce over a block and can keep half-precision scores."""

PROGRESSIVE, PROGRESSIVE_PARTS = "_progressive", 4
LOCK = "pattern_lock"
SECTION_2022 = "pruning.approach.weight_compression_pytorch"
DISTINCT_2X = (
    "pruning_configs", "target_sparsity", "pruning_type", "op_names", "excluded_op_names", "pruning_op_types",
    "pruning_scope", "pruning_frequency", "sparsity_decay_type", "start_step", "end_step", "pattern",
)  # fmt: skip


@register("dialect", "intel")
@dataclass(frozen=True)
class Intel:
    """One rule for each pruner, counted in steps."""

    keys: ClassVar[tuple[str, ...]] = ("pruning", *DISTINCT_2X)
    yaml_tags: ClassVar[tuple[str, ...]] = (TAG_OF_PRUNERS,)

    def recognises(self, mapping: Mapping[str, Any]) -> bool:
        """The section of 2022, or a key that only 2.x has."""
        return _is_2022(mapping) or any(key in mapping for key in DISTINCT_2X)

    def translate(self, mapping: Mapping[str, Any]) -> PruningConfig:
        """A rule for each pruner: its own settings before those for all, those before the defaults.

        Raises:
            ConfigError: an unknown key or a value that is not allowed.
        """
        mapping = {key: mapping[key] for key in mapping if key != "$schema"}
        if _is_2022(mapping):
            return _of_2022(File2022.model_validate(mapping))
        flat = Flat2x.model_validate(mapping)
        if "backend" in flat.model_fields_set:
            note_ignored("backend", "there is one")
        return _config(flat, flat.pruning_configs, "pruning_configs", {})


def _of_2022(file: File2022) -> PruningConfig:
    """The file of 2022: the section that counts steps, where no target leaves the model dense, or the older one."""
    others = [
        *sorted(file.model_fields_set - {"pruning"}),
        *(["pruning.train"] if file.pruning.train is not None else []),
    ]
    if others:
        note_ignored(", ".join(others), "the model, its data and its training are the loop's")
    older = file.pruning.approach.weight_compression
    if older is not None:
        return native(epoch_rules(older))
    section = file.pruning.approach.weight_compression_pytorch
    assert section is not None
    return _config(section, section.pruners, f"{SECTION_2022}.pruners", {"target_sparsity": 0.0})


def _config(
    everywhere: FileKeys, pruners: Sequence[PrunerKeys], prefix: str, defaults: Mapping[str, Any]
) -> PruningConfig:
    weight = everywhere.distill_loss_weight
    rules = _rules(everywhere, pruners, prefix, defaults)
    return native(rules, distillation={"weight": weight} if weight else None)


def _is_2022(mapping: Mapping[str, Any]) -> bool:
    return isinstance(mapping.get("pruning"), Mapping) and "approach" in mapping["pruning"]


def _rules(
    everywhere: PrunerKeys, pruners: Sequence[PrunerKeys], prefix: str, defaults: Mapping[str, Any]
) -> list[dict[str, Any]]:
    shared = everywhere.said()
    rules = []
    for number, pruner in enumerate(pruners or [PrunerKeys()]):
        own = pruner.said()
        values = {**DEFAULTS, **defaults, **shared, **own}
        lists = {**shared[EXCLUDED], **own[EXCLUDED]}
        values["excluded_op_names"] = list(dict.fromkeys(entry for entries in lists.values() for entry in entries))
        name = f"{prefix}[{number}]"
        if "target_sparsity" in defaults and values["target_sparsity"] == 0:
            note_ignored(name, "without target_sparsity it prunes nothing: the layers stay dense")
        rules.append(pruner_rule(values, name))
    return rules


def pruner_rule(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Translate one pruner's settings into a rule.

    Args:
        values: every key of :data:`DEFAULTS`.
        name: of the pruner, where it stands in the file.

    Raises:
        ConfigError: values that do not go together.
    """
    locked = values["pruning_type"].startswith(LOCK)
    if values["end_step"] == -1:
        note_ignored(f"{name}.end_step", "-1 is not a step; it is taken as start_step, at once")
    if locked or values["end_step"] == -1:  # one event, at the start
        values = {**values, "end_step": values["start_step"]}
    check_window(values["start_step"], values["end_step"], f"{name}.end_step", "start_step")
    pattern = pruner_pattern(values, name)
    target, most = values["target_sparsity"], values["max_sparsity_ratio_per_op"]
    if not locked and target > most:  # the original schedules towards the smaller of the two
        note_ignored(f"{name}.target_sparsity", f"{target} is above max_sparsity_ratio_per_op: {most} is reached")
        target = most
    _check_reachable(pattern, target, name, locked)
    lasso = {"type": "block_lasso", "strength": values["reg_coeff"]}
    return {
        "name": name,
        "pattern": pattern,
        "layers": _expressions(values["op_names"]) or None,
        "exclude": [f"?{entry}" for entry in _expressions(values["excluded_op_names"])],
        "criterion": "weight" if locked else pruner_criterion(values, f"{name}.pruning_type"),
        "schedule": schedule_name(values["sparsity_decay_type"], f"{name}.sparsity_decay_type"),
        "scope": values["pruning_scope"],
        **step_window(values["start_step"], values["end_step"], values["pruning_frequency"]),
        "unit": "step",
        "initial": None if locked or not target else "present" if values["resume_from_pruned_checkpoint"] else 0.0,
        "target": {"sparsity": target} if target else {},
        "min_sparsity": values["min_sparsity_ratio_per_op"],
        "max_sparsity": values["max_sparsity_ratio_per_op"],
        "regularizer": lasso if values["reg_type"] == "group_lasso" and values["reg_coeff"] > 0 else None,
        "keep_zeros": values["resume_from_pruned_checkpoint"],
        "progressive": PROGRESSIVE_PARTS if values["pruning_type"].endswith(PROGRESSIVE) else 1,
        "mode": "lock" if locked else "prune",
        "enabled": locked or target > 0 or values["reg_coeff"] > 0,
    }


def step_window(start: int, end: int, every: int) -> dict[str, int]:
    """Fields of a rule: the last event is the last one of the rhythm, so that event k of n is at (k - 1) / (n - 1)."""
    return {"start": start, "end": end - (end - start) % every, "every": every}


def pruner_pattern(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The pattern, with the classes of layers that it is for; the classifier is spared unless it is named."""
    text = str(values["pattern"])
    if "_pattern_" in text:  # oc_pattern_4x1, ic_pattern_4x1, tile_pattern_4x1
        text = text.rpartition("_")[2]
    if text == "mha":
        return {"type": "mha"}
    found = spelled("pattern", text)
    if found is None:
        raise ConfigError(unknown(f"{name}.pattern", text, ["4x1", "2:4", "channelx1", "1xchannel", "mha"]))
    return {**found, "types": list(values["pruning_op_types"]), "spare_last": True}


def pruner_criterion(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The criterion of a pruning_type, with its reduction and precision."""
    kind = str(values["pruning_type"]).removesuffix(PROGRESSIVE).removesuffix("_block")
    if kind in REDUCED:
        options = {"reduction": values["criterion_reduce_type"], "half": values["low_memory_usage"]}
        return {"type": REDUCED[kind], **options}
    if kind not in names("criterion"):
        kind = canonical("criterion", kind, where)
    return {"type": kind}


def _check_reachable(pattern: Mapping[str, Any], target: float, name: str, locked: bool) -> None:
    if pattern["type"] == "n_of_m" and not locked:
        most = pattern["drop"] / pattern["of"]
        if target > most:
            raise ConfigError(
                f"{name}.target_sparsity: {target} is out of reach of the pattern {pattern['drop']}:{pattern['of']}. "
                f"Allowed: at most {most:g}"
            )


def _expressions(entries: Sequence[str]) -> list[str]:
    """Regular expressions that are found anywhere in a name, as ours that match the whole name."""
    return [f"re:.*(?:{entry}).*" for entry in entries]
