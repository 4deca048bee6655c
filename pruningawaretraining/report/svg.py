"""Charts as inline SVG: small, sharp, and coloured by the page's style sheet, so that they follow light and dark.

Every function returns one ``<svg>`` element. Colours are classes (``s-dense``, ``s-kept``, ``phase-prune``, ...) that
the template defines; sizes are in units of the view box and scale with the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 430.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 12.0, 32.0
Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """A line: its label, its ``(x, y)`` points in order of x, and the class that colours it."""

    label: str
    points: Sequence[tuple[float, float]]
    style: str = "s-kept"


@dataclass(frozen=True)
class Band:
    """A phase behind a chart, from ``start`` to ``end`` on the x axis."""

    start: float
    end: float
    phase: str


@dataclass(frozen=True)
class Guide:
    """A dashed horizontal line at a value, with a label."""

    value: float
    label: str


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map from values to positions."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)


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


@dataclass(frozen=True)
class LineChart:
    """Lines over epochs with the phases behind them.

    Attributes:
        title: said to those who cannot see the picture.
        series: the lines.
        bands: phases, shaded.
        guides: dashed lines.
        y_format: text of a value.
        y_range: limits of the y axis; None takes them from the values.
        log: a logarithmic y axis.
        x_label: under the x axis.
    """

    title: str
    series: Sequence[Series]
    bands: Sequence[Band] = ()
    guides: Sequence[Guide] = ()
    y_format: Format = field(default=lambda value: f"{value:g}")
    y_range: tuple[float, float] | None = None
    log: bool = False
    x_label: str = "epoch"


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """About ``most`` round values (1, 2, 2.5 or 5 times a power of ten apart) within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10, 20) if power * factor >= raw * 0.9)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def decades(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten within [low, high], thinned to ``most``."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    step = max(1, math.ceil((last - first + 1) / most))
    return [10.0**exponent for exponent in range(first, last + 1, step)]


def power_of_ten(value: float) -> str:
    """``0.001 -> '10⁻³'``; 1 is shown as 1."""
    exponent = round(math.log10(value))
    digits = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return "1" if exponent == 0 else f"10{digits}"


def line_chart(chart: LineChart) -> Markup:
    """Lines with axes, phases and guides; a line is broken where its value is not finite."""
    xs = [x for line in chart.series for x, _ in line.points] + [edge for b in chart.bands for edge in (b.start, b.end)]
    x = Scale(min(xs, default=0.0), max(xs, default=1.0), LEFT, WIDTH - RIGHT)
    low, high = chart.y_range or _limits(chart)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP, chart.log)
    ticks = decades(low, high) if chart.log and high / low >= 100 else nice_ticks(low, high)
    parts = [_bands(chart.bands, x), _y_axis(ticks, y, chart.y_format), _x_axis(x, chart.x_label)]
    for guide in chart.guides:
        at = y(guide.value)
        parts.append(_line(LEFT, at, WIDTH - RIGHT, at, "guide"))
        above = at - 4 if at > TOP + 12 else at + 11
        parts.append(_text(WIDTH - RIGHT - 3, above, guide.label, "end", "note"))
    lines = Markup("").join(_series(line, x, y, chart) for line in chart.series)
    frame = (LEFT - 4, TOP - 4, WIDTH - RIGHT - LEFT + 8, HEIGHT - BOTTOM - TOP + 4)
    box = Markup('<svg x="{0:g}" y="{1:g}" width="{2:g}" height="{3:g}" viewBox="{0:g} {1:g} {2:g} {3:g}">{4}</svg>')
    return _svg(chart.title, HEIGHT, [*parts, box.format(*frame, lines)])  # the inner box clips what is off the axis


def _limits(chart: LineChart) -> tuple[float, float]:
    """The y limits: all values and guides with a little air; for a logarithm, positive values alone."""
    values = [y for line in chart.series for _, y in line.points] + [guide.value for guide in chart.guides]
    values = [value for value in values if math.isfinite(value) and (value > 0 or not chart.log)]
    if not values:
        return (0.1, 1.0) if chart.log else (0.0, 1.0)
    low, high = min(values), max(values)
    if chart.log:
        return low / 1.3, high * 1.3
    air = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
    return (0.0 if 0 <= low < air * 4 else low - air), high + air


def _series(line: Series, x: Scale, y: Scale, chart: LineChart) -> Markup:
    """The line, its last point, and a tooltip for each point."""
    finite = [(a, b) for a, b in line.points if math.isfinite(b) and (b > 0 or not chart.log)]
    commands, previous = [], None
    for a, b in line.points:
        shown = math.isfinite(b) and (b > 0 or not chart.log)
        if shown:
            commands.append(f"{'L' if previous else 'M'}{x(a):.1f} {y(b):.1f}")
        previous = shown
    parts = [Markup('<path class="line {}" d="{}"/>').format(line.style, " ".join(commands))]
    if finite:
        a, b = finite[-1]
        parts.append(Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(line.style, x(a), y(b)))
    if len(finite) <= 200:
        hit = Markup('<circle class="hit" cx="{:.1f}" cy="{:.1f}" r="7"><title>{}</title></circle>')
        label = f"{line.label}, {chart.x_label} "
        parts += [hit.format(x(a), y(b), f"{label}{a:g}: {chart.y_format(b)}") for a, b in finite]
    return Markup("").join(parts)


def ridge_chart(title: str, rows: Sequence[Ridge], edges: Sequence[float]) -> Markup:
    """Histograms one under the other over a shared logarithmic axis, earliest first.

    Args:
        title: said to those who cannot see the picture.
        rows: one histogram a moment; ``counts`` has one entry less than ``edges``.
        edges: bin edges, positive and increasing.
    """
    step, reach, width, left = 19.0, 32.0, 330.0, 26.0
    height = reach + step * (len(rows) - 1) + 24.0
    x = Scale(edges[0], edges[-1], left, width - 26, log=True)
    peak = max((max(row.counts, default=0.0) for row in rows), default=0.0) or 1.0
    base = height - 20.0
    parts = [_line(x(tick), 4, x(tick), base, "grid") for tick in decades(edges[0], edges[-1])]
    parts += [_text(x(tick), base + 14, power_of_ten(tick), "middle") for tick in decades(edges[0], edges[-1])]
    for number, row in enumerate(rows):
        floor = reach + step * number
        parts.append(_ridge(row, edges, x, floor, (reach - 2) / peak))
        parts.append(_text(left - 6, floor, row.label, "end"))
        if row.zeros:
            parts.append(_text(width, floor, f"{row.zeros}", "end"))
    return _svg(title, height, parts, width)


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


def interval_bars(title: str, bars: Sequence[tuple[str, str, float, float, float]], unit: str = "ms") -> Markup:
    """Horizontal bars with a whisker.

    Args:
        title: said to those who cannot see the picture.
        bars: ``(label, class, value, low, high)``.
        unit: behind the values.
    """
    step, left, right = 44.0, 6.0, 74.0
    height = step * len(bars) + 4
    x = Scale(0.0, max((max(bar[2], bar[4]) for bar in bars), default=1.0) or 1.0, left, WIDTH - right)
    parts = []
    for number, (label, style, value, low, high) in enumerate(bars):
        top = step * number
        parts.append(_text(left, top + 13, label, "start", "label"))
        box = Markup('<rect class="{}" x="{}" y="{:.1f}" width="{:.1f}" height="16" rx="2"/>')
        parts.append(box.format(f"bar {style}", left, top + 19, max(x(value) - left, 1.0)))
        parts.append(_line(x(low), top + 27, x(high), top + 27, "whisker"))
        parts.append(_text(max(x(value), x(high)) + 7, top + 31.5, f"{value:.3g} {unit}", "start", "value"))
    return _svg(title, height, parts)


def _bands(bands: Sequence[Band], x: Scale) -> Markup:
    rect = Markup('<rect class="band phase-{}" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>')
    size = HEIGHT - BOTTOM - TOP
    return Markup("").join(
        rect.format(band.phase, x(band.start), TOP, max(x(band.end) - x(band.start), 0.0), size, band.phase)
        for band in bands
    )


def _y_axis(ticks: Sequence[float], y: Scale, text: Format) -> Markup:
    lines = [_line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid") for tick in ticks]
    return Markup("").join(lines + [_text(LEFT - 6, y(tick) + 4, text(tick), "end") for tick in ticks])


def _x_axis(x: Scale, label: str) -> Markup:
    ticks = [tick for tick in nice_ticks(x.low, x.high, 8) if tick == round(tick)]
    texts = [_text(x(tick), HEIGHT - BOTTOM + 15, f"{tick:g}", "middle") for tick in ticks]
    base = HEIGHT - BOTTOM
    texts.append(_line(LEFT, base, WIDTH - RIGHT, base, "axis"))
    texts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, label, "middle", "note"))
    return Markup("").join(texts)


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(style, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(style, x, y, anchor, text)


def _svg(title: str, height: float, parts: Sequence[Markup], width: float = WIDTH) -> Markup:
    opening = Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">').format(width, height, escape(title))
    return opening + Markup("").join(parts) + Markup("</svg>")
