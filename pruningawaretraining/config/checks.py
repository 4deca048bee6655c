"""Checks of names, layers and sizes in a config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pruningawaretraining import schedules  # noqa: F401  (importing it registers the schedules)
from pruningawaretraining.config.structures import one_pattern
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.registry import build, canonical, names, spelled

EXPRESSIONS = ("re:", "in:", "param:")
"""How an entry of layers begins that holds a regular expression; see :mod:`pruningawaretraining.patterns.selection`."""

NAMED_ONLY = ("schedule", "scope", "allocation")


def layer_name(entry: Any, where: str) -> str:
    """A layer entry in normal form: checked, and without the ``module.`` that DataParallel puts in front.

    Raises:
        ConfigError: not a string, empty, or a regular expression that does not compile.
    """
    if not isinstance(entry, str) or not entry:
        raise ConfigError(f"{where}: {entry!r} is not the name of a layer")
    bare = entry.removeprefix("?")
    form = next((form for form in EXPRESSIONS if bare.startswith(form)), None)
    if form is None:
        return entry.removeprefix("module.")
    try:
        re.compile(bare.removeprefix(form))
    except re.error as error:
        raise ConfigError(f"{where}: {entry!r} is not a regular expression: {error}") from error
    return entry


def are_sizes(values: Any) -> bool:
    """Whether all values are whole numbers of 1 or more."""
    return all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in values)


def check_registered(kind: str, value: Any) -> Any:
    """A name or a mapping with options, as a key of a rule takes them; None where the key may be absent.

    Raises:
        ConfigError: neither, an unknown name, or an unknown option.
    """
    if kind == "pattern" and isinstance(value, (list, tuple)):
        return one_pattern(value)
    if value is None and kind in ("regularizer", "allocation"):
        return None
    if isinstance(value, str):
        return value if not names(kind) else check_name(kind, value)
    if kind in NAMED_ONLY or not isinstance(value, Mapping):
        form = "a name" if kind in NAMED_ONLY else "a name or a mapping with a 'type'"
        raise ConfigError(f"{kind}: {value!r} is not {form}. Allowed: {', '.join(names(kind))}")
    return dict(value) if not names(kind) else check_options(kind, value)


def check_name(kind: str, name: str) -> str:
    """The registered name that a text stands for, or the spelling as it is.

    Raises:
        ConfigError: nothing goes by it.
    """
    if spelled(kind, name) is None:
        name = canonical(kind, name)
    build(kind, name, kind)
    return name


def check_options(kind: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping with a registered ``type`` and options that it takes.

    Raises:
        ConfigError: an unknown type or option.
    """
    if not isinstance(spec.get("type"), str):
        missing = "has no 'type'" if "type" not in spec else f"has the 'type' {spec['type']!r}, which is not a name"
        raise ConfigError(f"{kind}: {dict(spec)!r} {missing}. Allowed: {', '.join(names(kind))}")
    build(kind, spec, kind)
    return {**spec, "type": canonical(kind, spec["type"])}
