"""Names of pruners in messages, and keys of theirs that have no effect beside others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pruningawaretraining.config.dialects.base import note_ignored
from pruningawaretraining.config.dialects.intel_keys import PrunerKeys
from pruningawaretraining.config.origin import Names

FIELDS = {
    "start": "start_step",
    "end": "end_step",
    "every": "pruning_frequency",
    "target": "target_sparsity",
    "pattern": "pattern",
    "pattern.types": "pruning_op_types",
    "types": "pruning_op_types",
    "layers": "op_names",
    "exclude": "excluded_op_names",
    "criterion": "pruning_type",
    "schedule": "sparsity_decay_type",
    "scope": "pruning_scope",
    "min_sparsity": "min_sparsity_ratio_per_op",
    "max_sparsity": "max_sparsity_ratio_per_op",
    "regularizer": "reg_coeff",
    "keep_zeros": "resume_from_pruned_checkpoint",
    "progressive": "pruning_type",
    "initial": "resume_from_pruned_checkpoint",
}
"""Field of a rule -> key of 2.x."""
LOCKED = (
    "end_step", "target_sparsity", "pruning_frequency", "sparsity_decay_type", "criterion_reduce_type", "reg_type",
    "low_memory_usage", "pruning_scope", "min_sparsity_ratio_per_op", "max_sparsity_ratio_per_op", "reg_coeff",
    "resume_from_pruned_checkpoint", "criterion_type",
)  # fmt: skip
"""Keys that say nothing about zeros that are locked."""


def spelled(prefix: str, section: str, shared: PrunerKeys, own: PrunerKeys) -> dict[str, str]:
    """2.x name of each key -> where the user has written it: in the pruner, before the settings for all."""
    for_all = {key: f"{section}.{name}" if section else name for key, name in shared.spelled().items()}
    return {**for_all, **{key: f"{prefix}.{name}" for key, name in own.spelled().items()}}


def names_of(place: str, where: Mapping[str, str], expressions: Sequence[str]) -> Names:
    """The names that messages use for the rule of a pruner.

    Args:
        place: of the pruner, or of the settings for all where there is none.
        where: see :func:`spelled`.
        expressions: those that its lists hold.
    """
    fields = {field: where.get(key, f"{place}.{key}".removeprefix(".")) for field, key in FIELDS.items()}
    return Names(place, fields, written(expressions))


def written(expressions: Sequence[str]) -> dict[str, str]:
    """Entries of layers -> the expressions that they were made of."""
    return {f"{mark}re:.*(?:{entry}).*": entry for entry in expressions for mark in ("", "?")}


def without_effect(values: Mapping[str, Any], kind: str, scored_by_itself: bool) -> dict[str, str]:
    """Keys of a pruner that change nothing beside its other ones -> why.

    Args:
        values: every key.
        kind: what scores.
        scored_by_itself: whether its criterion neither reduces over a block nor keeps half-precision scores.
    """
    if kind.startswith("pattern_lock"):
        return dict.fromkeys(LOCKED, f"{kind} keeps the zeros that are there at start_step")
    found: dict[str, str] = {}
    if values["pattern"] == "mha":
        found["pruning_op_types"] = "heads are found in attention blocks, whatever their layers' classes"
        found["pruning_type"] = f"criterion_type scores heads: {kind}"
    elif values.get("criterion_type", kind) != kind:
        found["criterion_type"] = f"pruning_type decides: {kind}"
    if scored_by_itself:
        found |= dict.fromkeys(("criterion_reduce_type", "low_memory_usage"), f"{kind} has one score for a block")
    if values["reg_type"] != "group_lasso":
        found["reg_coeff"] = "there is no reg_type: group_lasso"
    elif not values["reg_coeff"]:
        found["reg_type"] = "reg_coeff is 0"
    return found


def tell(
    pruners: Sequence[tuple[Mapping[str, Any], Mapping[str, str]]],
    unused: Sequence[Mapping[str, str]],
    defaults: Mapping[str, Any],
) -> None:
    """Warn of given keys that have no effect: those of a pruner, and global ones that no pruner uses.

    Args:
        pruners: all keys of each, and where they are written; see :func:`spelled`.
        unused: keys of each without effect -> why.
        defaults: what a key is that nobody gives; giving that is no news.
    """
    for number, (values, where) in enumerate(pruners):
        for key, why in unused[number].items():
            if key not in where or values.get(key) == defaults.get(key):
                continue
            alike = [other for other, (_, places) in enumerate(pruners) if places.get(key) == where[key]]
            if alike[0] == number and all(key in unused[other] for other in alike):
                note_ignored(where[key], why)
