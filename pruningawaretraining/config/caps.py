"""Caps of single sets of layers, from the file that ``pat sensitivity`` writes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pruningawaretraining.errors import ConfigError
from pruningawaretraining.files import read_json, reading

KEY = "max_sparsity_from"


def read_caps(path: str) -> dict[str, Any]:
    """Set -> largest sparsity, from a file of ``pat sensitivity`` or a plain JSON mapping.

    Raises:
        ConfigError: the file does not exist, or holds something else.
    """
    with reading(path, KEY, "a file of pat sensitivity", ConfigError):
        values = read_json(Path(os.path.expanduser(path)), KEY, ConfigError)
    sets = values.get("sets", values) if isinstance(values, Mapping) else None
    if not isinstance(sets, Mapping) or not sets:
        raise ConfigError(f"{KEY}: {path!r} holds no sets. Allowed: a file of pat sensitivity, or layer: fraction")
    return {name: one.get("max_sparsity") if isinstance(one, Mapping) else one for name, one in sets.items()}


def anchored_caps(mapping: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A native config whose rules name files of caps by absolute paths; anything else as it is.

    Args:
        mapping: the config.
        folder: relative paths are taken from it.
    """
    rules = mapping.get("rules")
    if not isinstance(rules, list):
        return dict(mapping)
    return {**mapping, "rules": [_anchored(rule, folder) for rule in rules]}


def _anchored(rule: Any, folder: Path) -> Any:
    given = rule.get(KEY) if isinstance(rule, Mapping) else None
    return {**rule, KEY: os.path.abspath(folder / os.path.expanduser(given))} if isinstance(given, str) else rule
