"""Histograms of norms through time as SVG, one under the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pruningawaretraining.report.svg import Scale, decades, line_at, power_of_ten, svg_of, text_at


@dataclass(frozen=True)
class Ridge:
    """One histogram of a ridge chart: a label, counts per bin, how many values are zero, and a class.

    ``near`` is the part of each count that is marked as near zero.
    """

    label: str
    counts: Sequence[float]
    zeros: int = 0
    style: str = "phase-prune"
    near: Sequence[float] = ()


def ridge_chart(title: str, rows: Sequence[Ridge], edges: Sequence[float]) -> Markup:
    """Histograms one under the other over a shared logarithmic axis, earliest first, each as high as it has room.

    Args:
        title: alt text.
        rows: one histogram a moment; ``counts`` has one entry less than ``edges``.
        edges: bin edges, positive and increasing.
    """
    step, reach, width, left = 19.0, 32.0, 330.0, 26.0
    height = reach + step * (len(rows) - 1) + 24.0
    x = Scale(edges[0], edges[-1], left, width - 26, log=True)
    base = height - 20.0
    parts = [line_at(x(tick), 4, x(tick), base, "grid") for tick in decades(edges[0], edges[-1])]
    parts += [text_at(x(tick), base + 14, power_of_ten(tick), "middle") for tick in decades(edges[0], edges[-1])]
    for number, row in enumerate(rows):
        floor = reach + step * number
        parts.append(_ridge(row, edges, x, floor, (reach - 2) / (max(row.counts, default=0.0) or 1.0)))
        parts.append(text_at(left - 6, floor, row.label, "end"))
        if row.zeros:
            parts.append(text_at(width, floor, f"{row.zeros}", "end"))
    return svg_of(title, height, parts, width)


def _ridge(row: Ridge, edges: Sequence[float], x: Scale, floor: float, unit: float) -> Markup:
    """One histogram as a filled staircase on its floor, with what is near zero on top."""
    shape = Markup('<path class="ridge {}" d="{}"><title>{}</title></path>')
    label = f"{row.label}: {sum(row.counts):g} groups, {row.zeros} at zero"
    near = f", {sum(row.near):g} near it" if row.near else ""
    drawn = shape.format(row.style, _staircase(row.counts, edges, x, floor, unit), label + near)
    if any(row.near):
        drawn += shape.format("near", _staircase(row.near, edges, x, floor, unit), label + near)
    return drawn


def _staircase(counts: Sequence[float], edges: Sequence[float], x: Scale, floor: float, unit: float) -> str:
    points = [f"M{x(edges[0]):.1f} {floor:.1f}"]
    for count, left, right in zip(counts, edges, edges[1:], strict=False):
        top = floor - unit * count
        points.append(f"L{x(left):.1f} {top:.1f}L{x(right):.1f} {top:.1f}")
    return "".join([*points, f"L{x(edges[-1]):.1f} {floor:.1f}Z"])
