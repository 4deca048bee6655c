"""What became of the sizes that a config has one number for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]


def is_uneven(before: Shapes, now: Shapes) -> bool:
    """Whether one size became several: of any layers, or of layers whose names differ in numbers alone."""
    found: dict[Any, set[int]] = {}
    for name, shape in now.items():
        for dim, (old, new) in enumerate(zip(before[name], shape, strict=True)):
            found.setdefault((re.sub(r"\d+", "", name), dim, old), set()).add(new)
            if old != new:
                found.setdefault(old, set()).add(new)
    return any(len(one) > 1 for one in found.values())


def several(before: int, pairs: set[tuple[int, int]]) -> str:
    """The sizes that one size became, as a warning says them; ``pairs`` are (before, after)."""
    return " and ".join(str(after) for one, after in sorted(pairs) if one == before)
