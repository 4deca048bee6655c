"""Runs side by side on one page: norms through time, what they reached, and where pruning could have started."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pruningawaretraining.analysis.gap_threshold import (
    Choice,
    before_pruning,
    choose,
    near_zero,
    one_file,
    share,
    with_removed,
)
from pruningawaretraining.report.figures import Figure, chosen_moments, shown_bins, total
from pruningawaretraining.report.html import render_template
from pruningawaretraining.report.numbers import as_csv, write
from pruningawaretraining.report.run import Run
from pruningawaretraining.report.svg import LineChart, Ridge, Series, line_chart, ridge_chart
from pruningawaretraining.version import __version__

MOST_SETS, OPEN_SETS = 60, 4
COLOURS = 8
HOLDS = 0.01
"""An accuracy holds when it is within so much of the dense model's; without one, of the best run's."""


@dataclass(frozen=True)
class Compared:
    """One run beside others.

    Attributes:
        name: in headings.
        run: what it recorded.
        strength: of its regulariser; None when unknown.
        choice: what its norms say.
        link: of its own report, relative to the page; "" for none.
    """

    name: str
    run: Run
    strength: float | None
    choice: Choice
    link: str = ""


def compared(name: str, run: Run, link: str = "") -> Compared:
    """A run with what its norms say."""
    run = replace(run, norms=with_removed(run.norms)) if run.norms else run
    return Compared(name, run, strength_of(run), choose(run), link)


def strength_of(run: Run) -> float | None:
    """The strength of the first regulariser in a run's config; None where there is none."""
    config: Any = run.summary.get("config")
    if not isinstance(config, Mapping):
        config = yaml.safe_load(run.config or "{}")
    pruning = config.get("pruning") if isinstance(config, Mapping) else None
    rules = pruning.get("rules", []) if isinstance(pruning, Mapping) else []
    for rule in rules:
        found = rule.get("regularizer")
        if isinstance(found, Mapping) and isinstance(found.get("strength"), (int, float)):
            return float(found["strength"])
    return None


def write_comparison(runs: Sequence[Compared], path: Path, title: str) -> list[Path]:
    """Write the page, and the same numbers as JSON and CSV beside it.

    Returns:
        The three paths.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    others = [path.with_suffix(suffix) for suffix in (".json", ".csv")]
    write(path, render_template("compare.html.j2", page(runs, title)))
    write(others[0], json.dumps([numbers(one) for one in runs], indent=1) + "\n")
    write(others[1], as_csv([row for one in runs for row in rows_of(one)]))
    return [path, *others]


def numbers(one: Compared) -> dict[str, Any]:
    """One run's numbers as plain data: what it reached, what its norms say, and the norms themselves."""
    return {
        "name": one.name,
        "strength": one.strength,
        **reached(one.run),
        "choice": asdict(one.choice),
        "epochs": [row for row in rows_of(one) if row["set"] == "all"],
        "norms": dict(one.run.norms),
    }


def reached(run: Run) -> dict[str, Any]:
    """Accuracy of the dense and the pruned model, and the fractions of MACs and parameters that are kept."""
    dense, pruned = run.summary.get("dense") or {}, run.summary.get("pruned") or {}
    last = run.lines_of("pruned")[-1:]
    whole = {key: pruned[key] / dense[key] for key in ("macs", "parameters") if dense.get(key) and pruned.get(key)}
    return {
        "dense_accuracy": dense.get("accuracy"),
        "accuracy": pruned.get("accuracy", last[0].get("accuracy") if last else None),
        "macs": whole.get("macs", last[0].get("macs") if last else None),
        "parameters": whole.get("parameters"),
    }


def rows_of(one: Compared) -> list[dict[str, Any]]:
    """One row for each epoch and set, and for all sets together: how many groups, and how many near zero."""
    edges = one.run.norms.get("edges") or []
    rows = []
    for moment in one.run.norms.get("epochs") or []:
        for name, found in {"all": None, **moment["sets"]}.items():
            sets = moment["sets"] if found is None else {name: found}
            size = sum(each["size"] + each.get("removed", 0) for each in sets.values())
            rows.append(
                {
                    "run": one.name,
                    "epoch": moment["epoch"],
                    "phase": moment.get("phase"),
                    "set": name,
                    "groups": size,
                    "near_zero": round(share(edges, sets, one.choice.threshold) * size),
                    "zero": sum(each.get("zeros", 0) for each in sets.values()),
                    "removed": sum(each.get("removed", 0) for each in sets.values()),
                }
            )
    return rows


# --- the page ---------------------------------------------------------------------------------------------------


def page(runs: Sequence[Compared], title: str) -> dict[str, Any]:
    """Everything that the template shows."""
    names = list(dict.fromkeys(name for one in runs for name in _sets(one.run)))
    sides = [{"name": "All groups", "figures": _ridges(runs, None)}]
    if len(names) > 1:
        sides += [{"name": name, "figures": _ridges(runs, name)} for name in names[:MOST_SETS]]
    return {
        "title": title,
        "version": __version__,
        "runs": [_row(one, number) for number, one in enumerate(runs)],
        "advice": advice(runs),
        "curves": [figure for figure in (_near(runs), _curve(runs, "accuracy"), _curve(runs, "macs")) if figure],
        "sides": sides,
        "open": OPEN_SETS + 1,
        "left_out": max(0, len(names) - MOST_SETS),
    }


def advice(runs: Sequence[Compared]) -> str:
    """Which of several runs their norms (and accuracies, where known) speak for, in a sentence.

    An accuracy is compared with that of the run's dense baseline, or with the best of the runs where none is known.
    Nothing is said of a single run, nor of runs of different models or data, nor of single checkpoints.
    """
    if len(runs) < 2 or len({_subject(one.run) for one in runs}) > 1 or any(one_file(one.run.norms) for one in runs):
        return ""
    losses = _losses(runs)
    good = [one for one, loss in zip(runs, losses, strict=True) if loss is None or _holds(loss)]
    known = [(one, loss) for one, loss in zip(runs, losses, strict=True) if loss is not None]
    if known and not any(_holds(loss) for _, loss in known):
        told = "; ".join(f"{one.name} is at {_against(one, loss)}" for one, loss in known)
        return f"Accuracy holds in none of them: {told}. Try a weaker regulariser, a milder target, or more epochs."
    apart = [one for one in good if one.choice.separated]
    if apart:
        chosen = max(apart, key=lambda one: (one.choice.settled, one.choice.share))
        text = f"its norms have fallen apart, with {100 * chosen.choice.share:.1f}% of the groups near zero"
    elif len(good) < len(runs):
        chosen = max(good, key=lambda one: (one.strength or 0.0, one.choice.share))
        text = "the strongest whose accuracy holds; its norms have not fallen apart, those of stronger ones may"
    else:
        return "In none of them have the norms fallen apart: try a stronger regulariser, or more epochs before pruning."
    loss = losses[next(at for at, one in enumerate(runs) if one is chosen)]
    if loss is None:
        return f"{chosen.name}: {text}."
    return f"{chosen.name}: {text}. Accuracy {_against(chosen, loss)}."


def _losses(runs: Sequence[Compared]) -> list[float | None]:
    """What accuracy each run lost; None where its own is not known."""
    found = [reached(one.run) for one in runs]
    best = max((one["accuracy"] for one in found if one["accuracy"] is not None), default=0.0)
    dense = [best if one["dense_accuracy"] is None else one["dense_accuracy"] for one in found]
    return [
        None if one["accuracy"] is None else float(whole - one["accuracy"])
        for one, whole in zip(found, dense, strict=True)
    ]


def _against(one: Compared, loss: float) -> str:
    """``27.50%, 0.50 points below its dense model (28.00%)``."""
    found = reached(one.run)
    side = "below" if loss >= 0 else "above"
    text = f"{100 * found['accuracy']:.2f}%, "
    points = f"{100 * abs(loss):.2f} points {side} " if abs(loss) >= 5e-5 else ""
    if found["dense_accuracy"] is None:
        return f"{text}{points}the best of these; there is no dense model to compare with"
    return f"{text}{points or 'as '}its dense model ({100 * found['dense_accuracy']:.2f}%)"


def _holds(loss: float) -> bool:
    return loss <= HOLDS + 1e-9


def _subject(run: Run) -> str:
    """What was trained on what; "" where nothing was recorded."""
    config = run.summary.get("config")
    model = config.get("model") if isinstance(config, Mapping) else None
    data = (run.summary.get("data") or {}).get("name")
    return json.dumps([model, data], sort_keys=True) if model or data else ""


def _row(one: Compared, number: int) -> dict[str, Any]:
    choice = one.choice
    return {
        "name": one.name,
        "style": f"r-{number % COLOURS}",
        "link": one.link,
        "strength": "–" if one.strength is None else f"{one.strength:g}",
        "epoch": "–" if choice.epoch is None else str(choice.epoch),
        "threshold": f"{choice.threshold:.2g}",
        "share": choice.share,
        "gap": f"{100 * choice.depth:.0f}% deep" if choice.separated else "none",
        "reason": choice.reason,
        **reached(one.run),
    }


def _sets(run: Run) -> list[str]:
    return list(dict.fromkeys(name for moment in run.norms.get("epochs") or [] for name in moment["sets"]))


def _curves(title: str, series: Sequence[Series], y_range: tuple[float, float] | None = None) -> Figure | None:
    series = [line for line in series if line.points]
    if not series:
        return None
    chart = LineChart(f"{title} by epoch", series, y_format=lambda value: f"{100 * value:.3g}%", y_range=y_range)
    return Figure(title, line_chart(chart), legend=tuple((line.style, line.label) for line in series))


def _near(runs: Sequence[Compared]) -> Figure | None:
    lines = []
    for number, one in enumerate(runs):
        edges, moments = one.run.norms.get("edges") or [], before_pruning(one.run.norms.get("epochs") or [])
        points = [(float(at["epoch"]), share(edges, at["sets"], one.choice.threshold)) for at in moments]
        lines.append(Series(one.name, points, f"r-{number % COLOURS}"))
    return _curves("Groups near zero, before pruning", lines)


def _curve(runs: Sequence[Compared], key: str) -> Figure | None:
    lines = []
    for number, one in enumerate(runs):
        points = [(float(row["epoch"]), float(row[key])) for row in one.run.lines_of("pruned") if row.get(key)]
        lines.append(Series(one.name, points, f"r-{number % COLOURS}"))
    values = sorted(value for line in lines for _, value in line.points)
    if key == "macs" or not values:
        return _curves("MACs kept", lines, (0.0, 1.02))
    low, high = values[int(0.1 * len(values))], values[-1]
    air = max(0.1 * (high - low), 0.004)
    return _curves("Test accuracy", lines, (max(0.0, low - air), min(1.0, high + air)))


def _ridges(runs: Sequence[Compared], name: str | None) -> list[Figure]:
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
