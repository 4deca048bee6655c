"""SparseML-style recipes: lists of tagged modifiers. Each pruning modifier becomes a rule (one a sparsity).

Learning rates and epochs are no pruning: :func:`pruningawaretraining.config.recipe.load_recipe` has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pruningawaretraining.config.dialects.base import native, note_ignored
from pruningawaretraining.config.dialects.sparseml_keys import (
    MODIFIERS,
    Modifier,
    Pruning,
    SecondOrderPruning,
    evaluated,
    parse_modifier,
    whole_epoch,
)
from pruningawaretraining.config.schema import PruningConfig
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.registry import register

ALL = ("__ALL_PRUNABLE__", "__ALL__")
SUFFIX = "weight"
CRITERIA = {"!OBSPruningModifier": "obs", "!CAPruningModifier": "cap", "!FastCAPruningModifier": "fast_cap"}
UNIFORM = ("!FastCAPruningModifier", "!MagnitudePruningModifier")
MASK_TYPES = "'unstructured', 'block4', 'RxC' such as '4x1', or 'N:M' such as '2:4'"


@register("dialect", "sparseml")
@dataclass(frozen=True)
class SparseMl:
    """Recipes with ``!CAPruningModifier`` and its kin."""

    keys: ClassVar[tuple[str, ...]] = ("modifiers", "pruning_modifiers", "training_modifiers")
    yaml_tags: ClassVar[tuple[str, ...]] = tuple(MODIFIERS)

    def recognises(self, mapping: Mapping[str, Any]) -> bool:
        """A list under a key that ends in "modifiers", at the top or in a stage."""
        return any(True for _ in _lists(mapping))

    def translate(self, mapping: Mapping[str, Any]) -> PruningConfig:
        """One rule for each pruning modifier and sparsity, in the recipe's order.

        Raises:
            ConfigError: an unknown modifier or key, or a value that is not allowed; or nothing in it prunes.
        """
        rules: list[dict[str, Any]] = []
        for where, tag, modifier in modifiers_of(mapping):
            if isinstance(modifier, Pruning):
                rules += _rules(where, tag, modifier)
        if not rules:
            raise ConfigError(f"recipe: no modifier in it prunes. Allowed: {', '.join(sorted(MODIFIERS))}")
        return native(rules)


def _lists(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    for key, value in mapping.items():
        if not isinstance(key, str):
            raise ConfigError(f"config: the key {key!r} is a {type(key).__name__}. Allowed: texts")
        if key.endswith("modifiers") and isinstance(value, list):
            yield prefix + key, value
        elif key.endswith("stage") and isinstance(value, Mapping):
            yield from _lists(value, f"{prefix}{key}.")


def modifiers_of(mapping: Mapping[str, Any]) -> Iterator[tuple[str, str, Modifier]]:
    """(place, tag, modifier) of everything in a recipe.

    Raises:
        ConfigError: see :func:`~pruningawaretraining.config.dialects.sparseml_keys.parse_modifier`.
    """
    variables: dict[str, Any] = {}
    for key, value in mapping.items():
        worked_out = evaluated(value, key, variables) if not isinstance(value, (list, Mapping)) else None
        if isinstance(worked_out, (int, float)):
            variables[key] = worked_out
    for where, values in _lists(mapping):
        for number, one in enumerate(values):
            place = f"{where}[{number}]"
            yield place, *parse_modifier(one, place, variables)


def _rules(where: str, tag: str, modifier: Pruning) -> Iterator[dict[str, Any]]:
    _note_what_differs(where, modifier)
    start = whole_epoch(modifier.start_epoch)
    end = start if modifier.end_epoch < 0 else whole_epoch(modifier.end_epoch)
    for number, (sparsity, params) in enumerate(_targets(where, modifier)):
        yield {
            "name": where if number == 0 else f"{where}.{number}",
            "pattern": pattern_of(modifier.mask_type, f"{where}.mask_type"),
            "layers": layers_of(params),
            "criterion": _criterion(tag, modifier),
            "schedule": "one_shot" if start == end else modifier.inter_func,
            "scope": _scope(tag, modifier),
            "start": start,
            "end": end,
            "every": max(1, whole_epoch(modifier.update_frequency)),
            "target": {"sparsity": sparsity},
            "at_init": start == end == 0,  # once, before any training
            "release": not modifier.leave_enabled,
        }


def _targets(where: str, modifier: Pruning) -> list[tuple[float, str | list[str]]]:
    """(sparsity, parameters) of a modifier."""
    final = modifier.final_sparsity
    if isinstance(final, dict):
        found: list[tuple[float, str | list[str]]] = []
        for text, params in final.items():
            try:
                found.append((float(text), params))
            except ValueError as error:
                raise ConfigError(f"{where}.final_sparsity: the key {text!r} is no number") from error
        return found
    if final is None:
        keep, _, of = modifier.mask_type.partition(":")
        if not (keep.isdigit() and of.isdigit()):
            raise ConfigError(f"{where}.final_sparsity: missing, but needed")
        final = 1 - int(keep) / int(of)
    return [(final, modifier.params)]


def _scope(tag: str, modifier: Pruning) -> str:
    if tag in UNIFORM or modifier.global_sparsity is False:
        return "local"
    return "global"


def _criterion(tag: str, modifier: Pruning) -> dict[str, Any]:
    if not isinstance(modifier, SecondOrderPruning):
        return {"type": "magnitude", "p": 1.0, "normalize": "none"}
    found: dict[str, Any] = {
        "type": CRITERIA[tag],
        "num_grads": modifier.num_grads,
        "fisher_block_size": modifier.fisher_block_size,
        "num_recomputations": modifier.num_recomputations,
        "micro_batch": modifier.grad_sampler_kwargs.get("batch_size"),
    }
    if modifier.damp is not None:
        found["damp"] = modifier.damp
    if found["type"] == "cap":
        found["merge"] = "cumulative"  # as published
    if found["type"] != "fast_cap":
        parallel = modifier.blocks_in_parallel
        found["blocks_in_parallel"] = parallel if parallel is not None and parallel > 0 else None
        found["fisher_inv_device"] = modifier.fisher_inv_device
        found["traces_backup_dir"] = modifier.traces_backup_dir
    return found


def _note_what_differs(where: str, modifier: Pruning) -> None:
    if modifier.init_sparsity not in (0.0, "__FROM_PARAM__"):
        note_ignored(f"{where}.init_sparsity", "the sparsity rises from what is there to the final one")
    for key in ("start_epoch", "end_epoch", "update_frequency"):
        value = getattr(modifier, key)
        if value != int(value):
            note_ignored(f"{where}.{key}", f"events are at whole epochs: {value} is taken as {whole_epoch(value)}")
    for key in modifier.grad_sampler_kwargs if isinstance(modifier, SecondOrderPruning) else ():
        if key != "batch_size":
            note_ignored(f"{where}.grad_sampler_kwargs.{key}", "the loader that is given decides")


def pattern_of(mask_type: str, where: str) -> str | dict[str, Any]:
    """The pattern that a mask_type stands for. In "N:M" N of M stay.

    Raises:
        ConfigError: none is known by that name.
    """
    text = mask_type.strip().lower()
    if text == "unstructured":
        return text
    if text == "block4":
        return {"type": "block", "rows": 1, "columns": 4}
    for separator in ("x", ":"):
        first, found, second = text.partition(separator)
        if not (found and first.isdigit() and second.isdigit()):
            continue
        one, two = int(first), int(second)
        if separator == "x":
            return {"type": "block", "rows": one, "columns": two}
        if 0 < one < two:
            return {"type": "n_of_m", "drop": two - one, "of": two}
    raise ConfigError(f"{where}: {mask_type!r} is not known. Allowed: {MASK_TYPES}, with N below M")


def layers_of(params: str | list[str]) -> list[str] | None:
    """Layers from names of parameters; None for all that can be pruned."""
    given = [params] if isinstance(params, str) else params
    if any(name in ALL for name in given):
        return None
    return [_layer(name) for name in given]


def _layer(param: str) -> str:
    """``a.b.weight`` as ``a.b``, and a regular expression for such names as one for layers."""
    for ending in (f"\\.{SUFFIX}", f".{SUFFIX}", SUFFIX):
        for tail in ("$", ""):
            if param.startswith("re:") and param.endswith(ending + tail):
                return param.removesuffix(ending + tail)
    return param if param.startswith("re:") else param.removesuffix(f".{SUFFIX}")
