"""Runs side by side: what is compared of each, and the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pruningawaretraining.analysis.control import Effect, effect
from pruningawaretraining.analysis.gap_threshold import (
    Choice,
    before_pruning,
    choose,
    near_zero,
    share,
    with_removed,
)
from pruningawaretraining.config.load import parse_mapping
from pruningawaretraining.report.figures import Figure, chosen_moments, shown_bins, total, without_climb
from pruningawaretraining.report.ridges import Ridge, ridge_chart
from pruningawaretraining.report.run import CONFIG, Run
from pruningawaretraining.report.svg import LineChart, Series, line_chart

COLOURS = 8


@dataclass(frozen=True)
class Compared:
    """One run beside others.

    Attributes:
        name: in headings.
        run: what it recorded.
        strength: of its regulariser; None when unknown.
        choice: what its norms say.
        link: of its own report, relative to the page; "" for none.
        effect: what its regulariser did before pruning, against the dense model; None where nothing is known.
    """

    name: str
    run: Run
    strength: float | None
    choice: Choice
    link: str = ""
    effect: Effect | None = None


def compared(name: str, run: Run, link: str = "") -> Compared:
    """A run with what its norms say."""
    found = effect(run)
    run = replace(run, norms=with_removed(run.norms)) if run.norms else run
    return Compared(name, run, strength_of(run), choose(run), link, found)


def dense_accuracy(run: Run) -> float | None:
    """Accuracy of the dense baseline; None of a run without one."""
    found: float | None = (run.summary.get("dense") or {}).get("accuracy")
    return found


def with_dense_of(run: Run, other: Run) -> Run:
    """A run without a dense baseline beside the baseline of another; one that has its own stays as it is."""
    if dense_accuracy(run) is not None:
        return run
    dense = {**(run.summary.get("dense") or {}), "accuracy": dense_accuracy(other)}
    control = {key: value for key, value in other.norms.items() if key == "dense"}
    return replace(run, summary={**run.summary, "dense": dense}, norms={**run.norms, **control})


def strength_of(run: Run) -> float | None:
    """The strength of the first regulariser in a run's config, or None."""
    config: Any = run.summary.get("config")
    if not isinstance(config, Mapping):
        config = parse_mapping(run.config or "{}", Path(CONFIG))
    pruning = config.get("pruning") if isinstance(config, Mapping) else None
    rules = pruning.get("rules", []) if isinstance(pruning, Mapping) else []
    for rule in rules:
        found = rule.get("regularizer")
        if isinstance(found, Mapping) and isinstance(found.get("strength"), (int, float)):
            return float(found["strength"])
    return None


def _curves(
    title: str, series: Sequence[Series], y_range: tuple[float, float] | None = None, note: str = ""
) -> Figure | None:
    series = [line for line in series if line.points]
    if not series:
        return None
    chart = LineChart(f"{title} by epoch", series, y_format=lambda value: f"{100 * value:.3g}%", y_range=y_range)
    return Figure(title, line_chart(chart), note, legend=tuple((line.style, line.label) for line in series))


def energy_figure(runs: Sequence[Compared]) -> Figure | None:
    """The energy of the groups that will go, by epoch, until pruning begins.

    Of one run as a part of the whole, with the dense baseline beside it; of several relative to the baseline.
    """
    known = [(f"r-{number % COLOURS}", one, one.effect) for number, one in enumerate(runs) if one.effect is not None]
    if len(runs) == 1:
        lines = [line for style, one, found in known for line in _energies(one.name, found, style)]
        note = "The lowest groups of each set of layers, as many as the run removed: their part of the sum of squares."
        return _curves("Energy of the lowest groups", lines, _from_zero(lines), note)
    lines = [Series(one.name, found.relative, style) for style, one, found in known]
    note = "Sum of squares of each set's lowest groups, as many as the run removed, relative to the dense model's."
    return _curves("Energy of the lowest groups, dense = 100%", lines, _from_zero(lines), note)


def _from_zero(lines: Sequence[Series]) -> tuple[float, float]:
    """An axis that makes no difference look larger than it is."""
    return 0.0, 1.05 * max((value for line in lines for _, value in line.points), default=1.0)


def _energies(name: str, found: Effect, style: str) -> list[Series]:
    own = [(float(epoch), share) for epoch, share in found.energy]
    return [
        Series("dense", [(float(epoch), share) for epoch, share in found.control], "s-dense"),
        Series(name, own, style),
    ]


def near_figure(runs: Sequence[Compared]) -> Figure | None:
    """The share of groups near zero by epoch, until pruning begins; None where there are none at any time."""
    lines = []
    for number, one in enumerate(runs):
        edges, moments = one.run.norms.get("edges") or [], before_pruning(one.run.norms.get("epochs") or [])
        points = [(float(at["epoch"]), share(edges, at["sets"], one.choice.threshold)) for at in moments]
        lines.append(Series(one.name, points, f"r-{number % COLOURS}"))
    if not any(value for line in lines for _, value in line.points):
        return None
    return _curves("Groups near zero, before pruning", lines)


def curve_figure(runs: Sequence[Compared], key: str) -> Figure | None:
    """Test accuracy or the share of MACs by epoch."""
    lines = []
    for number, one in enumerate(runs):
        points = [(float(row["epoch"]), float(row[key])) for row in one.run.lines_of("pruned") if row.get(key)]
        lines.append(Series(one.name, points, f"r-{number % COLOURS}"))
    if key == "macs":
        return _curves("MACs kept", lines, (0.0, 1.02))
    return _curves("Test accuracy", lines, *without_climb(lines))


def ridge_figures(runs: Sequence[Compared], name: str | None) -> list[Figure]:
    """One ridge chart a run, all over the same part of the axis."""
    edges: list[float] = next((one.run.norms["edges"] for one in runs if one.run.norms.get("edges")), [])
    drawn = []
    for one in runs:
        epochs = one.run.norms.get("epochs") or []
        shown = [epochs[at] for at in chosen_moments(epochs)] if epochs else []
        if name is not None:
            shown = [moment for moment in shown if name in moment["sets"]]
        drawn.append((one, shown))
    counts = [_counts(moment, name, len(edges) - 1) for _, shown in drawn for moment in shown]
    if not counts:
        return []
    bins = shown_bins(counts, edges)
    figures = []
    for one, shown in drawn:
        rows = [_ridge(moment, name, edges, one.choice.threshold, bins) for moment in shown]
        if rows:
            label = f"Norms of {name or 'all groups'}, {one.name}"
            figures.append(Figure(one.name, ridge_chart(label, rows, edges[bins.start : bins.stop + 1])))
    return figures


def _counts(moment: Mapping[str, Any], name: str | None, bins: int) -> list[int]:
    found: list[int] = total(moment, bins)["counts"] if name is None else moment["sets"][name]["counts"]
    return found


def _ridge(moment: Mapping[str, Any], name: str | None, edges: Sequence[float], threshold: float, bins: slice) -> Ridge:
    sets = moment["sets"] if name is None else {name: moment["sets"][name]}
    near = [near_zero(edges, one["counts"], threshold) for one in sets.values()]
    zeros = sum(one.get("zeros", 0) + one.get("removed", 0) for one in sets.values())
    summed = [sum(column) for column in zip(*near, strict=True)]
    phase = moment.get("phase") or "train"
    counts = _counts(moment, name, len(edges) - 1)
    return Ridge(f"{moment['epoch']}", counts[bins], zeros, f"phase-{phase}", summed[bins])
