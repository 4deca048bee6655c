"""Names of a recipe's rules in messages: those of its modifiers and their keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pruningawaretraining.config.dialects import sparseml_keys as keys
from pruningawaretraining.config.dialects.sparseml_criteria import TARGETS
from pruningawaretraining.config.dialects.sparseml_phases import PLACES
from pruningawaretraining.config.dialects.sparseml_recipe import Found
from pruningawaretraining.config.origin import Names

FIELDS = {
    "layers": ("params", "targets"),
    "exclude": ("ignore",),
    "pattern": ("mask_type", "mask_structure"),
    "scope": ("global_sparsity",),
    "start": ("start_epoch",),
    "end": ("end_epoch",),
    "every": ("update_frequency",),
    "schedule": ("inter_func",),
    "initial": ("init_sparsity",),
    "target": TARGETS,
    "sparsity": TARGETS,
    "release": ("leave_enabled",),
    "keep_zeros": ("init_sparsity", "preserve_sparsity_mask"),
}
"""Field of a rule or phase -> the key that a modifier may have for it."""


def names_of(rule: Mapping[str, Any], found: Sequence[Found]) -> Names:
    """The names of a rule.

    Args:
        rule: its fields.
        found: the modifiers of its recipe.
    """
    by_place = {one.where: one for one in found}
    one = _of(rule["name"], by_place)
    fields = _fields(one)
    places: dict[str, str] = {}
    for number, (place, layers) in enumerate(rule.get(PLACES, ())):
        inner = _of(place, by_place)
        places = {**dict.fromkeys(layers, _fields(inner).get("layers", place)), **places}
        fields[f"phases[{number}]"] = inner.where
        fields |= {f"phases[{number}].{field}": key for field, key in _fields(inner).items()}
    entries = [*(rule.get("layers") or ()), *rule.get("exclude", ())]
    written = {text: _written(entry) for entry in entries for text in (entry, entry.removeprefix("?"))}
    return Names(one.where, fields, written, places)


def _of(name: str, by_place: Mapping[str, Found]) -> Found:
    """The modifier of a rule; one of several sparsities has a number behind its place."""
    return by_place.get(name) or by_place.get(name.rpartition(".")[0]) or Found(name, "", keys.Modifier())


def _fields(one: Found) -> dict[str, str]:
    known = type(one.modifier).model_fields
    found = {field: next((key for key in may if key in known), None) for field, may in FIELDS.items()}
    return {field: one.key(key) for field, key in found.items() if key is not None}


def _written(entry: str) -> str:
    """An entry of layers as a recipe has it."""
    bare = entry.removeprefix("?")
    for form in ("param:", "in:"):
        if bare.startswith(form):
            return f"re:{bare.removeprefix(form)}"
    return bare
