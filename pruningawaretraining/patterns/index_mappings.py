"""Torch-Pruning's index mappings, applied to whole vectors of channel indices; known by the names of their classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pruningawaretraining.patterns.coupling import Indices

FROM_THE_END = 1 << 62
"""Where a slice starts that counts from the end, autograd has a number beyond this one."""


def map_indices(chain: list[Any], indices: Indices) -> tuple[Indices | None, Indices]:
    """Send indices through a dependency's index mappings: (positions that go through, their images)."""
    positions, images = np.arange(len(indices)), indices
    for mapping in chain:
        if mapping is None:
            continue
        function = _VECTORISED.get(type(mapping).__name__)
        if function is None or not _is_sound(mapping):
            return None, images
        kept, images = function(mapping, images)
        positions = positions[kept]
    return positions, images


def _is_sound(mapping: Any) -> bool:
    """Whether a mapping can be right: some are made of widths that Torch-Pruning could not infer."""
    if type(mapping).__name__ == "_SliceIndexMapping" and not 0 <= mapping.start < FROM_THE_END:
        return False
    return len(getattr(mapping, "offset", (0, 0))) == 2 and int(getattr(mapping, "_stride", 1)) >= 1


def _flatten(mapping: Any, indices: Indices) -> tuple[Indices, Indices]:
    stride = mapping._stride
    if mapping.reverse:
        return np.arange(len(indices)), indices // stride
    kept = np.repeat(np.arange(len(indices)), stride)
    return kept, (indices[:, None] * stride + np.arange(stride)).reshape(-1)


def _window(mapping: Any, indices: Indices) -> tuple[Indices, Indices]:
    low, high = mapping.offset
    kept = np.nonzero((indices >= low) & (indices < high))[0]
    return kept, indices[kept] - low


def _shift(mapping: Any, indices: Indices) -> tuple[Indices, Indices]:
    return np.arange(len(indices)), indices + mapping.offset[0]


def _concat(mapping: Any, indices: Indices) -> tuple[Indices, Indices]:
    return _window(mapping, indices) if mapping.reverse else _shift(mapping, indices)


def _split(mapping: Any, indices: Indices) -> tuple[Indices, Indices]:
    return _shift(mapping, indices) if mapping.reverse else _window(mapping, indices)


def _slice(mapping: Any, indices: Indices) -> tuple[Indices, Indices]:
    if mapping.reverse:
        return np.arange(len(indices)), indices * mapping.step + mapping.start
    end = min(mapping.end, math.inf)
    inside = (indices >= mapping.start) & (indices < end) & ((indices - mapping.start) % mapping.step == 0)
    kept = np.nonzero(inside)[0]
    return kept, (indices[kept] - mapping.start) // mapping.step


_VECTORISED: dict[str, Callable[[Any, Indices], tuple[Indices, Indices]]] = {
    "_FlattenIndexMapping": _flatten,
    "_ConcatIndexMapping": _concat,
    "_SplitIndexMapping": _split,
    "_SliceIndexMapping": _slice,
}
