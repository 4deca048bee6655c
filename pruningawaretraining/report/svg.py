"""Charts as SVG, inline in a page or as files; the style sheet colours them, light and dark.

Each function returns one ``<svg>`` element. Colours are classes (``s-dense``, ``s-kept``, ``phase-prune``, ...) of the
style sheet; sizes are in units of the view box and scale with the page.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup, escape

WIDTH, HEIGHT = 430.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 12.0, 32.0
LEGEND = 16.0
"""Height of a legend above the lines."""
STYLE = Path(__file__).parent / "templates" / "style.css.j2"
DARK = re.compile(r"^@media \(prefers-color-scheme: dark\) \{\n.*?^\}\n", re.DOTALL | re.MULTILINE)
"""The part of the style sheet that is for dark colours."""
Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """A line, or points apart.

    Attributes:
        label: in the legend and in tooltips.
        points: ``(x, y)``, in order of x.
        style: the class that colours it.
        marks: a text for each point; points with texts are drawn apart, without a line.
    """

    label: str
    points: Sequence[tuple[float, float]]
    style: str = "s-kept"
    marks: Sequence[str] = ()


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
class LineChart:
    """Lines or points, with the phases behind them.

    Attributes:
        title: alt text.
        series: the lines.
        bands: phases, shaded.
        guides: dashed lines.
        y_format: text of a value.
        y_range: limits of the y axis; None takes them from the values.
        log: a logarithmic y axis.
        x_label: under the x axis.
        x_format: text of a position.
        whole: whether only whole numbers are marked on the x axis.
        x_range: limits of the x axis; None takes them from the values.
        legend: whether the labels of the lines stand above them, for pictures without a page around them.
    """

    title: str
    series: Sequence[Series]
    bands: Sequence[Band] = ()
    guides: Sequence[Guide] = ()
    y_format: Format = field(default=lambda value: f"{value:g}")
    y_range: tuple[float, float] | None = None
    log: bool = False
    x_label: str = "epoch"
    x_format: Format = field(default=lambda value: f"{value:g}")
    whole: bool = True
    x_range: tuple[float, float] | None = None
    legend: bool = False


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
    """Powers of ten within [low, high], thinned to ``most``; with fewer than two, 1, 2 and 5 times a power of ten."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first < 1:
        finer = [factor * 10.0**exponent for exponent in range(first - 1, last + 2) for factor in (1, 2, 5)]
        return [value for value in finer if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
    step = max(1, math.ceil((last - first + 1) / most))
    return [10.0**exponent for exponent in range(first, last + 1, step)]


def power_of_ten(value: float) -> str:
    """``0.001 -> '10⁻³'``; 1 and values between powers of ten as plain numbers."""
    exponent = round(math.log10(value))
    if abs(value / 10.0**exponent - 1) > 1e-6:
        return f"{value:g}"
    digits = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return "1" if exponent == 0 else f"10{digits}"


def line_chart(chart: LineChart) -> Markup:
    """Lines with axes, phases and guides; a line is broken where its value is not finite."""
    xs = [x for line in chart.series for x, _ in line.points] + [edge for b in chart.bands for edge in (b.start, b.end)]
    x = Scale(*(chart.x_range or (min(xs, default=0.0), max(xs, default=1.0))), LEFT, WIDTH - RIGHT)
    low, high = chart.y_range or _limits(chart)
    top = TOP + LEGEND if chart.legend else TOP
    y = Scale(low, high, HEIGHT - BOTTOM, top, chart.log)
    ticks = decades(low, high) if chart.log and high / low >= 100 else nice_ticks(low, high)
    parts = [_bands(chart.bands, x, top), _y_axis(ticks, y, chart.y_format), _x_axis(x, chart)]
    for guide in chart.guides:
        at = y(guide.value)
        parts.append(line_at(LEFT, at, WIDTH - RIGHT, at, "guide"))
        above = at - 4 if at > top + 12 else at + 11
        parts.append(text_at(LEFT + 3, above, guide.label, "start", "note"))
    lines = Markup("").join(_series(line, x, y, chart) for line in chart.series)
    frame = (LEFT - 4, top - 4, WIDTH - RIGHT - LEFT + 8, HEIGHT - BOTTOM - top + 4)
    box = Markup('<svg x="{0:g}" y="{1:g}" width="{2:g}" height="{3:g}" viewBox="{0:g} {1:g} {2:g} {3:g}">{4}</svg>')
    parts.append(box.format(*frame, lines))
    return svg_of(chart.title, HEIGHT, [*parts, *_legend(chart)])  # the inner box clips what is off the axis


def _legend(chart: LineChart) -> list[Markup]:
    """The labels in a row at the top, each behind a dot in the colour of its line."""
    if not chart.legend:
        return []
    dot = Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="4"/>')
    parts, at = [], LEFT + 4
    for line in chart.series:
        parts += [dot.format(line.style, at, TOP - 1), text_at(at + 8, TOP + 3, line.label, "start", "note")]
        at += 24 + 6.2 * len(line.label)
    return parts


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
    """The line and its last point, or all points with their texts; and a tooltip for each point."""
    if line.marks:
        return _points(line, x, y, chart)
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


def _points(line: Series, x: Scale, y: Scale, chart: LineChart) -> Markup:
    dot = Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="4"><title>{}</title></circle>')
    parts = []
    for (a, b), text in zip(line.points, line.marks, strict=True):
        label = f"{text}: {chart.x_format(a)}, {chart.y_format(b)}"
        parts.append(dot.format(line.style, x(a), y(b), label))
        right = x(a) > (LEFT + WIDTH) / 2
        parts.append(text_at(x(a) + (-8 if right else 8), y(b) + 4, text, "end" if right else "start", "note"))
    return Markup("").join(parts)


def interval_bars(title: str, bars: Sequence[tuple[str, str, float, float, float]], unit: str = "ms") -> Markup:
    """Horizontal bars with a whisker.

    Args:
        title: alt text.
        bars: ``(label, class, value, low, high)``.
        unit: behind the values.
    """
    step, left, right = 44.0, 6.0, 74.0
    height = step * len(bars) + 4
    x = Scale(0.0, max((max(bar[2], bar[4]) for bar in bars), default=1.0) or 1.0, left, WIDTH - right)
    parts = []
    for number, (label, style, value, low, high) in enumerate(bars):
        top = step * number
        parts.append(text_at(left, top + 13, label, "start", "label"))
        box = Markup('<rect class="{}" x="{}" y="{:.1f}" width="{:.1f}" height="16" rx="2"/>')
        parts.append(box.format(f"bar {style}", left, top + 19, max(x(value) - left, 1.0)))
        for style in ("whisker halo", "whisker"):  # readable on the bar and beside it
            parts.append(line_at(x(low), top + 27, x(high), top + 27, style))
            parts += [line_at(x(end), top + 22.5, x(end), top + 31.5, style) for end in (low, high)]
        parts.append(text_at(max(x(value), x(high)) + 7, top + 31.5, f"{value:.3g} {unit}", "start", "value"))
    return svg_of(title, height, parts)


def _bands(bands: Sequence[Band], x: Scale, top: float) -> Markup:
    rect = Markup('<rect class="band phase-{}" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>')
    size = HEIGHT - BOTTOM - top
    return Markup("").join(
        rect.format(band.phase, x(band.start), top, max(x(band.end) - x(band.start), 0.0), size, band.phase)
        for band in bands
    )


def _y_axis(ticks: Sequence[float], y: Scale, text: Format) -> Markup:
    lines = [line_at(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid") for tick in ticks]
    return Markup("").join(lines + [text_at(LEFT - 6, y(tick) + 4, text(tick), "end") for tick in ticks])


def _x_axis(x: Scale, chart: LineChart) -> Markup:
    ticks = [tick for tick in nice_ticks(x.low, x.high, 8) if not chart.whole or tick == round(tick)]
    texts = [text_at(x(tick), HEIGHT - BOTTOM + 15, chart.x_format(tick), "middle") for tick in ticks]
    base = HEIGHT - BOTTOM
    texts.append(line_at(LEFT, base, WIDTH - RIGHT, base, "axis"))
    texts.append(text_at((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, chart.x_label, "middle", "note"))
    return Markup("").join(texts)


def line_at(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    """A straight line."""
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(style, x1, y1, x2, y2)


def text_at(x: float, y: float, text: str, anchor: str, style: str = "tick") -> Markup:
    """A text at a position; ``anchor`` is start, middle or end."""
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(style, x, y, anchor, text)


def svg_of(title: str, height: float, parts: Sequence[Markup], width: float = WIDTH) -> Markup:
    """The parts as one ``<svg>`` element."""
    opening = Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">').format(width, height, escape(title))
    return opening + Markup("").join(parts) + Markup("</svg>")


def standalone(drawn: Markup, light: bool = False) -> str:
    """A picture as a file of its own, with the colours of the report.

    Args:
        drawn: an ``<svg>`` element.
        light: whether it stands on white whatever the system prefers; otherwise its colours follow the system.
    """
    style = STYLE.read_text(encoding="utf-8")
    if light:
        style = DARK.sub("", style).replace("color-scheme: light dark;", "color-scheme: light;")
    opening = '<svg xmlns="http://www.w3.org/2000/svg" '
    head, _, rest = str(drawn).removeprefix("<svg ").partition(">")
    return f"{opening}{head}><style>{style}</style>{rest}\n"
