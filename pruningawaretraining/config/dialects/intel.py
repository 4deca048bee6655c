"""Step-wise pattern pruning: the YAML of 2022 with its ``!Pruner`` tags, and the flat form of 2.x."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pruningawaretraining.config.dialects.base import check_window, native, note_ignored, schedule_name
from pruningawaretraining.config.dialects.intel_epochs import epoch_rules
from pruningawaretraining.config.dialects.intel_keys import (
    EXCLUDED,
    TAG_OF_2X,
    TAG_OF_PRUNERS,
    File2022,
    FileKeys,
    Flat2x,
    PrunerKeys,
)
from pruningawaretraining.config.dialects.intel_names import names_of, spelled, tell, without_effect
from pruningawaretraining.config.origin import Names
from pruningawaretraining.config.schema import PruningConfig
from pruningawaretraining.errors import ConfigError, unknown
from pruningawaretraining.registry import canonical, register
from pruningawaretraining.registry import names as registered
from pruningawaretraining.registry import spelled as spelled_pattern

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
    "spare_last": True,
}

REDUCED = {"magnitude": "weight", "gradient": "gradient", "snip": "snip", "snip_momentum": "snip_momentum"}
"""pruning_type -> criterion, of those that reduce over a block and can keep half-precision scores."""

PROGRESSIVE, PROGRESSIVE_PARTS = "_progressive", 4
LOCK = "pattern_lock"
SECTION_2022, SECTION_2X = "pruning.approach.weight_compression_pytorch", "pruning.approach.weight_compression_v2"
OF_2022: dict[str, Any] = {
    "target_sparsity": 0.0, "pruning_op_types": ["Conv2d", "Linear"], "spare_last": False
}  # fmt: skip
"""Defaults of 2022 that 2.x has changed; what 2.x takes for the classifier was pruned then, unless it was excluded."""
DISTINCT_2X = (
    "pruning_configs", "target_sparsity", "pruning_type", "op_names", "excluded_op_names", "pruning_op_types",
    "pruning_scope", "pruning_frequency", "sparsity_decay_type", "start_step", "end_step", "pattern",
)  # fmt: skip


@register("dialect", "intel")
@dataclass(frozen=True)
class Intel:
    """One rule for each pruner, counted in steps."""

    keys: ClassVar[tuple[str, ...]] = ("pruning", *DISTINCT_2X)
    yaml_tags: ClassVar[tuple[str, ...]] = (TAG_OF_PRUNERS, TAG_OF_2X)

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
        return _config(flat, flat.pruning_configs, "", "pruning_configs", {})


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
        return native(*epoch_rules(older), counts_epochs=True)
    newer = file.pruning.approach.weight_compression_v2
    if newer is not None:
        return _config(newer, newer.pruners, SECTION_2X, f"{SECTION_2X}.pruners", {})
    section = file.pruning.approach.weight_compression_pytorch
    assert section is not None
    return _config(section, section.pruners, SECTION_2022, f"{SECTION_2022}.pruners", OF_2022)


def _config(
    everywhere: FileKeys, pruners: Sequence[PrunerKeys], section: str, prefix: str, defaults: Mapping[str, Any]
) -> PruningConfig:
    """A rule for each pruner; without any, one for the settings for all.

    Args:
        everywhere: settings for all.
        pruners: with their own.
        section: where the settings for all are; "" for the top level.
        prefix: of the list of pruners.
        defaults: where they differ from those of 2.x.
    """
    weight, known = everywhere.distill_loss_weight, {**DEFAULTS, **defaults}
    found = []
    for number, pruner in enumerate(pruners or [PrunerKeys()]):
        name = f"{prefix}[{number}]"
        found.append((name, _values(everywhere, pruner, known), spelled(name, section, everywhere, pruner)))
    unused = [without_effect(values, kind_of(values), not _reduces(kind_of(values))) for _, values, _ in found]
    tell([(values, where) for _, values, where in found], unused, known)
    rules, names = [], []
    for name, values, where in found:
        if not defaults.get("target_sparsity", 1.0) and values["target_sparsity"] == 0:
            note_ignored(name, "without target_sparsity it prunes nothing: the layers stay dense")
        names.append(names_of(name if pruners else section, where, [*values["op_names"], *values["excluded_op_names"]]))
        rules.append(pruner_rule(values, name, names[-1]))
    return native(rules, names, distillation={"weight": weight} if weight else None)


def _values(everywhere: PrunerKeys, pruner: PrunerKeys, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of a pruner: its own settings before those for all, those before the defaults."""
    shared, own = everywhere.said(), pruner.said()
    values = {**defaults, **shared, **own}
    lists = {**shared[EXCLUDED], **own[EXCLUDED]}
    values["excluded_op_names"] = list(dict.fromkeys(entry for entries in lists.values() for entry in entries))
    return values


def _is_2022(mapping: Mapping[str, Any]) -> bool:
    return isinstance(mapping.get("pruning"), Mapping) and "approach" in mapping["pruning"]


def pruner_rule(values: Mapping[str, Any], name: str, names: Names) -> dict[str, Any]:
    """Translate one pruner's settings into a rule.

    Args:
        values: every key of :data:`DEFAULTS`.
        name: of the pruner, where it stands in the file.
        names: of its rule in messages.

    Raises:
        ConfigError: values that do not go together.
    """
    kind = kind_of(values)
    locked = kind.startswith(LOCK)
    if values["end_step"] == -1:
        note_ignored(names.key("end"), "-1 is not a step; it is taken as start_step, at once")
    if locked or values["end_step"] == -1:  # one event, at the start
        values = {**values, "end_step": values["start_step"]}
    check_window(values["start_step"], values["end_step"], names.key("end"), "start_step")
    pattern = pruner_pattern(values, names.key("pattern"))
    target, most = values["target_sparsity"], values["max_sparsity_ratio_per_op"]
    if not locked and target > most:  # the original schedules towards the smaller of the two
        note_ignored(names.key("target"), f"{target} is above {names.key('max_sparsity')}: {most} is reached")
        target = most
    _check_reachable(pattern, target, names.key("target"), locked)
    lasso = {"type": "block_lasso", "strength": values["reg_coeff"]}
    return {
        "name": name,
        "pattern": pattern,
        "layers": _expressions(values["op_names"]) or None,
        "exclude": [f"?{entry}" for entry in _expressions(values["excluded_op_names"])],
        "criterion": "weight" if locked else pruner_criterion({**values, "pruning_type": kind}, names.key("criterion")),
        "schedule": schedule_name(values["sparsity_decay_type"], names.key("schedule")),
        "scope": values["pruning_scope"],
        **step_window(values["start_step"], values["end_step"], values["pruning_frequency"]),
        "unit": "step",
        "initial": None if locked or not target else "present" if values["resume_from_pruned_checkpoint"] else 0.0,
        "target": {"sparsity": target} if target else {},
        "min_sparsity": values["min_sparsity_ratio_per_op"],
        "max_sparsity": values["max_sparsity_ratio_per_op"],
        "regularizer": lasso if values["reg_type"] == "group_lasso" and values["reg_coeff"] > 0 else None,
        "keep_zeros": values["resume_from_pruned_checkpoint"],
        "progressive": PROGRESSIVE_PARTS if kind.endswith(PROGRESSIVE) else 1,
        "mode": "lock" if locked else "prune",
        "enabled": locked or target > 0 or values["reg_coeff"] > 0,
    }


def step_window(start: int, end: int, every: int) -> dict[str, int]:
    """Fields of a rule: the last event is the last one of the rhythm, so that event k of n is at (k - 1) / (n - 1)."""
    return {"start": start, "end": end - (end - start) % every, "every": every}


def pruner_pattern(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The pattern, with the classes of layers that it is for; the classifier is spared unless it is named."""
    text = str(values["pattern"])
    if "_pattern_" in text:  # oc_pattern_4x1, ic_pattern_4x1, tile_pattern_4x1
        text = text.rpartition("_")[2]
    if text == "mha":
        return {"type": "mha"}
    found = spelled_pattern("pattern", text)
    if found is None:
        raise ConfigError(unknown(where, text, ["4x1", "2:4", "channelx1", "1xchannel", "mha"]))
    return {**found, "types": list(values["pruning_op_types"]), "spare_last": values["spare_last"]}


def kind_of(values: Mapping[str, Any]) -> str:
    """What scores: pruning_type, or for heads criterion_type."""
    by_heads = values["pattern"] == "mha"
    return str(values.get("criterion_type", DEFAULTS["pruning_type"]) if by_heads else values["pruning_type"])


def _reduces(kind: str) -> bool:
    """Whether a pruning_type scores single weights, whose scores are reduced over a block."""
    return kind.removesuffix(PROGRESSIVE).removesuffix("_block") in REDUCED


def pruner_criterion(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The criterion of a pruning_type, with its reduction and precision."""
    kind = str(values["pruning_type"]).removesuffix(PROGRESSIVE).removesuffix("_block")
    if _reduces(kind):
        options = {"reduction": values["criterion_reduce_type"], "half": values["low_memory_usage"]}
        return {"type": REDUCED[kind], **options}
    if kind not in registered("criterion"):
        kind = canonical("criterion", kind, where)
    return {"type": kind}


def _check_reachable(pattern: Mapping[str, Any], target: float, where: str, locked: bool) -> None:
    if pattern["type"] == "n_of_m" and not locked:
        most = pattern["drop"] / pattern["of"]
        if target > most:
            raise ConfigError(
                f"{where}: {target} is out of reach of the pattern {pattern['drop']}:{pattern['of']}. "
                f"Allowed: at most {most:g}"
            )


def _expressions(entries: Sequence[str]) -> list[str]:
    """Regular expressions that are found anywhere in a name, as ours that match the whole name."""
    return [f"re:.*(?:{entry}).*" for entry in entries]
