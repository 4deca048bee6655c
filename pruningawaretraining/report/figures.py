"""The pictures of the report, from a run's numbers; what a run did not record gives no picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pruningawaretraining.report.nouns import units_of
from pruningawaretraining.report.ridges import Ridge, ridge_chart
from pruningawaretraining.report.run import Run
from pruningawaretraining.report.svg import (
    Band,
    Guide,
    LineChart,
    Series,
    interval_bars,
    line_chart,
)

FALL = 0.1
"""Of an accuracy from one epoch to the next: what falls by so much has ended its climb."""
_ROWS = 8
_STYLES = {"dense": "s-dense", "pruned": "s-kept"}


@dataclass(frozen=True)
class Figure:
    """A picture with its heading, a note under it, and the legend's ``(class, label)`` pairs."""

    title: str
    svg: Markup
    note: str = ""
    legend: tuple[tuple[str, str], ...] = ()


def timeline(run: Run) -> list[Figure]:
    """Accuracy, loss, MACs and learning rate by epoch, with the phases behind them."""
    bands = [Band(phase.first - 0.5, phase.last + 0.5, phase.name) for phase in run.phases]
    figures = [_accuracy(run, bands), _loss(run, bands), _kept(run, bands), _rate(run, bands)]
    return [figure for figure in figures if figure is not None]


def _series(run: Run, key: str, models: Sequence[str] = ("dense", "pruned")) -> list[Series]:
    """A line for each model that recorded ``key``."""
    found = []
    for model in models:
        points = [(float(line["epoch"]), _number(line.get(key))) for line in run.lines_of(model)]
        if any(math.isfinite(value) for _, value in points):
            found.append(Series(model, points, _STYLES[model]))
    return found


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _figure(title: str, chart: LineChart, note: str = "") -> Figure | None:
    legend = tuple((line.style, line.label) for line in chart.series)
    return Figure(title, line_chart(chart), note, legend) if chart.series else None


def _accuracy(run: Run, bands: Sequence[Band]) -> Figure | None:
    series = _series(run, "accuracy")

    def text(value: float) -> str:
        return f"{100 * value:.3g}%"

    limits, note = without_climb(series)
    chart = LineChart("Test accuracy by epoch", series, bands, y_format=text, y_range=limits)
    return _figure("Test accuracy", chart, note)


def without_climb(series: Sequence[Series]) -> tuple[tuple[float, float] | None, str]:
    """Limits of an axis of accuracies that leave out at most the climb at the beginning, and a note if they do.

    What comes after a line has first reached nine tenths of its best value, or first falls by a tenth, is shown whole:
    a fall stays in sight. A line that climbs for more than half of its epochs is shown whole.
    """
    shown, every = [], []
    for line in series:
        values = [value for _, value in line.points if math.isfinite(value)]
        top = 0.9 * max(values, default=0.0)
        nexts = [*values[1:], math.inf]
        ends = (value >= top or value - after > FALL for value, after in zip(values, nexts, strict=False))
        start = next((at for at, ended in enumerate(ends) if ended), 0)
        shown += values[start if 2 * start <= len(values) else 0 :]
        every += values
    if not shown:
        return None, ""
    air = max(0.08 * (max(shown) - min(shown)), 0.004)
    limits = (max(0.0, min(shown) - air), min(1.0, max(shown) + air))
    return limits, "The first epochs lie below the axis." if min(every) < limits[0] else ""


def _loss(run: Run, bands: Sequence[Band]) -> Figure | None:
    series = _series(run, "loss")
    values = [value for line in series for _, value in line.points if math.isfinite(value) and value > 0]
    log = bool(values) and max(values) / min(values) > 30
    form = "on a logarithmic axis" if log else ""
    chart = LineChart("Training loss by epoch", series, bands, log=log, y_format=lambda value: f"{value:.3g}")
    return _figure("Training loss", chart, form)


def _kept(run: Run, bands: Sequence[Band]) -> Figure | None:
    macs = [Series("MACs kept", line.points, "s-kept") for line in _series(run, "macs", ("pruned",))]
    gone = units_of(run.summary).label
    sparsity = [Series(gone, line.points, "s-other") for line in _series(run, "sparsity", ("pruned",))]
    members = [one["target"].get("macs") for one in run.summary.get("family") or []]
    targets = [one for one in members or [(run.summary.get("target") or {}).get("macs")] if one]
    guides = [Guide(float(one), f"target {100 * one:.3g}% of MACs") for one in targets]

    def text(value: float) -> str:
        return f"{100 * value:.3g}%"

    chart = LineChart("MACs kept by epoch", macs + sparsity, bands, guides, text, (0.0, 1.02))
    return _figure("What is kept", chart)


def _rate(run: Run, bands: Sequence[Band]) -> Figure | None:
    series = _series(run, "lr", ("pruned",))
    values = [value for line in series for _, value in line.points if math.isfinite(value) and value > 0]
    log = bool(values) and max(values) / min(values) > 200
    chart = LineChart("Learning rate by epoch", series, bands, log=log, y_format=lambda value: f"{value:.2g}")
    return _figure("Learning rate", chart)


def latency(found: Mapping[str, Any]) -> Figure | None:
    """Median latency with the range from the 10th to the 90th percentile."""
    bars = [
        (
            name,
            style,
            float(one["median_ms"]),
            float(one.get("p10", one["median_ms"])),
            float(one.get("p90", one["median_ms"])),
        )
        for name, style in _STYLES.items()
        if (one := found.get(name))
    ]
    return Figure("Latency", interval_bars("Latency, dense and pruned", bars)) if bars else None


def norms(run: Run, most: int = 60) -> list[Figure]:
    """Norm histograms through the phases: all sets together, then each set, at most ``most`` of them."""
    edges, epochs = run.norms.get("edges") or [], run.norms.get("epochs") or []
    if len(edges) < 2 or not epochs:
        return []
    shown = [epochs[number] for number in chosen_moments(epochs)]
    names = list(dict.fromkeys(name for one in epochs for name in one["sets"]))
    totals = [(one, total(one, len(edges) - 1)) for one in shown]
    rows = {"All groups": totals}
    if len(names) > 1:
        rows |= {name: [(one, one["sets"][name]) for one in shown if name in one["sets"]] for name in names[:most]}
    return [_norm_figure(name, found, edges) for name, found in rows.items()]


def chosen_moments(epochs: Sequence[Mapping[str, Any]]) -> list[int]:
    """At most ``_ROWS`` positions: the first, the last, the ends of phases, and others spread evenly between."""
    last = len(epochs) - 1
    ends = [number for number in range(last) if epochs[number].get("phase") != epochs[number + 1].get("phase")]
    must = sorted({0, last, *ends})
    if len(must) >= _ROWS:
        return must[: _ROWS - 1] + [last]
    evenly = [round(number * last / (_ROWS - 1)) for number in range(_ROWS)]
    for position in sorted(evenly, key=lambda at: -min(abs(at - one) for one in must)):
        if len(must) < _ROWS and position not in must:
            must.append(position)
    return sorted(must)


def total(epoch: Mapping[str, Any], bins: int) -> dict[str, Any]:
    """The sets of one epoch added up."""
    counts, zeros = [0] * bins, 0
    for one in epoch["sets"].values():
        counts = [left + right for left, right in zip(counts, one["counts"], strict=True)]
        zeros += one.get("zeros", 0)
    return {"counts": counts, "zeros": zeros}


def _norm_figure(
    title: str, rows: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], edges: Sequence[float]
) -> Figure:
    bins = shown_bins([found["counts"] for _, found in rows], edges)
    ridges = [
        Ridge(f"{epoch['epoch']}", found["counts"][bins], found.get("zeros", 0), f"phase-{epoch.get('phase')}")
        for epoch, found in rows
    ]
    return Figure(title, ridge_chart(f"Norms of {title} by epoch", ridges, edges[bins.start : bins.stop + 1]))


def shown_bins(counts: Sequence[Sequence[int]], edges: Sequence[float]) -> slice:
    """The bins that hold anything and one on either side: room for two of 1, 2 and 5 times a power of ten."""
    filled = [number for row in counts for number, count in enumerate(row) if count]
    bins = len(edges) - 1
    if not filled:
        return slice(0, bins)
    low, high = max(0, min(filled) - 1), min(bins, max(filled) + 2)
    while edges[high] < 5.1 * edges[low] and (low, high) != (0, bins):
        low, high = max(0, low - 1), min(bins, high + 1)
    return slice(low, high)
