"""What each module computes itself, apart from its children."""

from __future__ import annotations

from collections.abc import Mapping


def own_macs(name: str, per_layer: Mapping[str, float]) -> float:
    """The MACs of a module without those of its children; none of a list of modules, which is never called itself."""
    return max(per_layer.get(name, 0) - _macs_inside(name, per_layer), 0)


def _macs_inside(name: str, per_layer: Mapping[str, float]) -> float:
    """The MACs of a module's children; of a child that is never called, those of its own children."""
    prefix = f"{name}." if name else ""
    children = (one for one in per_layer if one.startswith(prefix) and one and "." not in one[len(prefix) :])
    return sum(per_layer[one] or _macs_inside(one, per_layer) for one in children)
