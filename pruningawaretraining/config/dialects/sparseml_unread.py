"""Keys and variables of recipes that other keys leave without effect; each is said."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pruningawaretraining.config.dialects import sparseml_keys as keys
from pruningawaretraining.config.dialects.base import note_ignored
from pruningawaretraining.config.dialects.sparseml_recipe import Found
from pruningawaretraining.errors import nearest

DECAYING = ("exponential", "step")
"""lr_func that read decay_rate and decay_epochs."""


def tell_of_unread(found: Iterable[Found]) -> None:
    """Say which keys of modifiers are not read beside their other ones."""
    for one in found:
        if isinstance(one.modifier, keys.RateFunction):
            _tell_of_rates(one, one.modifier)
        elif isinstance(one.modifier, keys.Pruning):
            _tell_of_windows(one, one.modifier)


def _tell_of_rates(one: Found, modifier: keys.RateFunction) -> None:
    given = modifier.model_fields_set
    for key in ("decay_rate", "decay_epochs"):
        if key in given and modifier.lr_func not in DECAYING:
            note_ignored(one.key(key), f"lr_func is {modifier.lr_func}")
    if modifier.warmup and modifier.cycle_warmup not in (0, modifier.warmup):
        note_ignored(one.key("cycle_warmup"), f"warmup decides: {modifier.warmup:g}")


def _tell_of_windows(one: Found, modifier: keys.Pruning) -> None:
    text = str(modifier.mask_type).strip().lower()
    if text in ("n:m", "nm", f"{modifier.n}:{modifier.m}"):
        return
    for key in ("n", "m"):
        if getattr(modifier, key) is not None:
            note_ignored(one.key(key), f"mask_type is {modifier.mask_type!r}")


def tell_of_variables(recipe: Mapping[str, Any], variables: Iterable[str]) -> None:
    """Say which of the variables that a user gives are read by nothing in a recipe.

    Args:
        recipe: as it is read from its file.
        variables: their names.
    """
    read = {name for text in _texts(recipe) for name in _names_in(text)}
    for name in variables:
        if name not in read:
            close = nearest(name, sorted(read))
            hint = f"; did you mean {close!r}?" if close else ""
            note_ignored(name, f"no eval(...) of the recipe reads it{hint}")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, Mapping)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def _names_in(text: str) -> set[str]:
    if not text.startswith("eval("):
        return set()
    try:
        return {node.id for node in ast.walk(ast.parse(text[5:].rstrip()[:-1].strip())) if isinstance(node, ast.Name)}
    except (SyntaxError, ValueError, RecursionError):  # said where its value is needed
        return set()
