"""Picture of coupled layers: layers from input to output, with lines through those that are pruned together.

Lines of sets that do not overlap share a lane, so that the picture of a ResNet-50 is as wide as that of a small one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

STEP, LANE, TOP, WIDTH = 17.0, 13.0, 6.0, 430.0
BAR, NUMBERS = 84.0, 78.0
COLOURS = 8
LINE = Markup('<line class="lane r-{}" x1="{:g}" x2="{:g}" y1="{:g}" y2="{:g}"><title>{}</title></line>')
CIRCLE = Markup('<circle class="{}" cx="{:g}" cy="{:g}" r="{:g}"><title>{}</title></circle>')
NAME = Markup('<text class="row name" x="{:g}" y="{:g}">{}<title>{}</title></text>')
BOX = Markup('<rect class="{}" x="{:g}" y="{:g}" width="{:.1f}" height="9" rx="1.5"/>')
VALUE = Markup('<text x="{:g}" y="{:g}" text-anchor="end">{}</text>')


def lanes(members: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """A lane for each set of more than one layer, none of which overlap within a lane.

    Args:
        members: set -> positions of its layers, ascending.
    """
    found: dict[str, int] = {}
    ends: list[int] = []
    for name, rows in sorted(members.items(), key=lambda item: item[1][0]):
        if len(rows) < 2:
            continue
        free = next((lane for lane, end in enumerate(ends) if end < rows[0]), len(ends))
        ends[free : free + 1] = [rows[-1]]
        found[name] = free
    return found


def picture(layers: Sequence[Mapping[str, Any]]) -> Markup:
    """The width of each layer, and which layers are coupled, as one ``<svg>`` element; empty without layers.

    Args:
        layers: rows of a report: ``name``, ``set``, ``dense_out`` and ``kept_out``.
    """
    members: dict[str, list[int]] = {}
    for row, layer in enumerate(layers):
        if layer.get("set"):
            members.setdefault(str(layer["set"]), []).append(row)
    if not layers:
        return Markup("")
    lane_of = lanes(members)
    left = LANE * (1 + max(lane_of.values(), default=0)) + 14 if members else 0.0
    numbers = {name: number for number, name in enumerate(lane_of)}
    widest = max((int(layer.get("dense_out") or 0) for layer in layers), default=1) or 1
    parts = [_lane(name, members[name], lane, numbers[name]) for name, lane in lane_of.items()]
    for row, layer in enumerate(layers):
        parts.append(_row(row, layer, left, widest))
        if layer.get("set"):
            parts.append(_knot(row, layer, lane_of, numbers))
    height = TOP * 2 + STEP * len(layers)
    opening = Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="Width of each layer">').format(WIDTH, height)
    return opening + Markup("").join(parts) + Markup("</svg>")


def _middle(row: int) -> float:
    return TOP + STEP * (row + 0.5)


def _lane(name: str, rows: Sequence[int], lane: int, number: int) -> Markup:
    x = 8 + LANE * lane
    label = f"{name}: {len(rows)} coupled layers"
    return LINE.format(number % COLOURS, x, x, _middle(rows[0]), _middle(rows[-1]), label)


def _knot(row: int, layer: Mapping[str, Any], lane_of: Mapping[str, int], numbers: Mapping[str, int]) -> Markup:
    name = str(layer["set"])
    alone = name not in lane_of
    lane = max(lane_of.values(), default=0) if alone else lane_of[name]
    style = "knot alone" if alone else f"knot r-{numbers[name] % COLOURS}"
    x = 8 + LANE * lane + (LANE if alone and lane_of else 0)
    return CIRCLE.format(style, x, _middle(row), 3 if alone else 4.2, f"set {name}")


def _row(row: int, layer: Mapping[str, Any], left: float, widest: int) -> Markup:
    """The name of a layer, the bar of its width, and the width as text."""
    middle = _middle(row)
    dense, kept = layer.get("dense_out"), layer.get("kept_out")
    name = str(layer.get("name", "?"))
    room = int((WIDTH - left - BAR - NUMBERS - 8) / 6.1)
    shown = name if len(name) <= room else f"…{name[1 - room :]}"
    parts = [NAME.format(left + 6, middle + 4, shown, f"{name} ({layer.get('type') or '?'})")]
    if dense and kept is not None:
        start, unit = WIDTH - BAR - NUMBERS, BAR / widest
        parts.append(BOX.format("back", start, middle - 4.5, max(1.0, dense * unit)))
        parts.append(BOX.format("front", start, middle - 4.5, kept * unit))
        value = str(dense) if kept == dense else f"{kept} / {dense}"
        parts.append(VALUE.format(WIDTH, middle + 4, value))
    return Markup("").join(parts)
