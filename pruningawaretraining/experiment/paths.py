"""Paths in experiments: relative ones are taken from the folder of the config, and written down absolute."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pruningawaretraining.config.caps import anchored_caps


def anchored(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """An experiment's mapping with every path in it absolute.

    Args:
        values: the mapping; it is not changed.
        folder: relative paths are taken from it.
    """
    values = dict(values)
    if isinstance(values.get("pruning"), str):
        values["pruning"] = absolute(values["pruning"], folder)
    if isinstance(values.get("pruning"), Mapping):
        values["pruning"] = anchored_caps(values["pruning"], folder)
    for section, key in (("data", "root"), ("model", "weights")):
        inner = values.get(section)
        if isinstance(inner, Mapping) and isinstance(inner.get(key), str):
            values[section] = {**inner, key: absolute(inner[key], folder)}
    return values


def absolute(path: str, folder: Path) -> str:
    """A path, ``~`` and all, taken from ``folder``; symbolic links stay."""
    return os.path.abspath(folder / os.path.expanduser(path))
