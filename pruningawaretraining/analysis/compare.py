"""Runs side by side on one page: norms through time, what they reached, and where pruning could have started."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pruningawaretraining.analysis.compare_figures import (
    COLOURS,
    Compared,
    curve_figure,
    energy_figure,
    near_figure,
    ridge_figures,
)
from pruningawaretraining.analysis.control import effect_text
from pruningawaretraining.analysis.gap_threshold import Choice, one_file, share
from pruningawaretraining.files import write_text
from pruningawaretraining.report.html import render_template
from pruningawaretraining.report.numbers import as_csv
from pruningawaretraining.report.run import Run
from pruningawaretraining.version import __version__

MOST_SETS, OPEN_SETS = 60, 4
HOLDS = 0.01
"""An accuracy holds when it is within so much of the dense model's; without one, of the best run's."""


def write_comparison(runs: Sequence[Compared], path: Path, title: str) -> list[Path]:
    """Write the page, and the same numbers as JSON and CSV beside it.

    Returns:
        The three paths.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    others = [path.with_suffix(suffix) for suffix in (".json", ".csv")]
    write_text(path, render_template("compare.html.j2", page(runs, title)))
    write_text(others[0], json.dumps([numbers(one) for one in runs], indent=1) + "\n")
    write_text(others[1], as_csv([row for one in runs for row in rows_of(one)]))
    return [path, *others]


def numbers(one: Compared) -> dict[str, Any]:
    """One run's numbers as plain data: what it reached, what its norms say, and the norms themselves."""
    return {
        "name": one.name,
        "strength": one.strength,
        **reached(one.run),
        "choice": asdict(one.choice),
        "effect": None if one.effect is None else asdict(one.effect),
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
    sides, together = _sides(runs, names[:MOST_SETS]), advice(runs)
    return {
        "title": title,
        "version": __version__,
        "runs": [_row(one, number, not together) for number, one in enumerate(runs)],
        "advice": together,
        "curves": [
            figure
            for figure in (
                energy_figure(runs),
                near_figure(runs),
                curve_figure(runs, "accuracy"),
                curve_figure(runs, "macs"),
            )
            if figure
        ],
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
        return f"Accuracy holds in none of them: {told}. Try {_direction(known)}a milder target, or more epochs."
    apart = [one for one in good if one.choice.separated]
    if apart:
        chosen = max(apart, key=lambda one: (one.choice.share, one.choice.settled))
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


def _direction(known: Sequence[tuple[Compared, float]]) -> str:
    """``"a weaker regulariser, "`` where the weakest of several kept the most accuracy, and the other way round."""
    losses = {one.strength: loss for one, loss in known if one.strength is not None}
    if len(losses) < 2 or len(set(losses.values())) < 2:
        return ""
    best = min(losses, key=lambda strength: losses[strength])
    return {min(losses): "a weaker regulariser, ", max(losses): "a stronger regulariser, "}.get(best, "")


def _losses(runs: Sequence[Compared]) -> list[float | None]:
    """Accuracy lost by each run; None if its own is unknown."""
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
    """The model and data of a run as text; "" if they were not recorded."""
    config = run.summary.get("config")
    model = config.get("model") if isinstance(config, Mapping) else None
    data = (run.summary.get("data") or {}).get("name")
    return json.dumps([model, data], sort_keys=True) if model or data else ""


def _row(one: Compared, number: int, alone: bool) -> dict[str, Any]:
    choice = one.choice
    return {
        "name": one.name,
        "style": f"r-{number % COLOURS}",
        "link": one.link,
        "strength": "–" if one.strength is None else f"{one.strength:g}",
        "epoch": start_of(choice),
        "threshold": f"{choice.threshold:.2g}",
        "share": choice.share,
        "gap": f"{100 * choice.depth:.0f}% deep" if choice.separated else "none",
        "reason": told(one, alone),
        **reached(one.run),
    }


def _sides(runs: Sequence[Compared], names: Sequence[str]) -> list[dict[str, Any]]:
    """Histograms of all groups, then set by set, the runs beside each other; those of one run lie in one grid."""
    shown = [("All groups", ridge_figures(runs, None))]
    if len(names) > 1:
        shown += [(name, ridge_figures(runs, name)) for name in names]
    if len(runs) > 1:
        return [{"name": name, "figures": figures} for name, figures in shown]
    return [{"name": "", "figures": [replace(one, title=name) for name, figures in shown for one in figures]}]


def start_of(choice: Choice) -> str:
    """The epoch to start after, for a table; none where norms without a gap do not speak for one."""
    return "–" if choice.epoch is None or not choice.separated else str(choice.epoch)


def told(one: Compared, alone: bool = True) -> str:
    """Describe a run in sentences: its norms, the effect of its regulariser against the dense model, and its accuracy.

    Args:
        one: the run.
        alone: whether to say what to try next; of several runs, :func:`advice` does.
    """
    found, loss = reached(one.run), _losses([one])[0]
    text = " ".join(part for part in (one.choice.reason, effect_text(one.effect)) if part)
    if one.choice.separated or not _ended(one.run) or found["dense_accuracy"] is None or loss is None:
        return text
    against = f"Pruned, the run ended at {_against(one, loss)}"
    if _holds(loss):
        return f"{text} {against}: the ranking chose well without a gap."
    if not alone:
        return f"{text} {against}."
    return f"{text} {against}: regularise longer or more strongly, prune less, or train longer afterwards."


def _ended(run: Run) -> bool:
    return (run.summary.get("pruned") or {}).get("accuracy") is not None


def _sets(run: Run) -> list[str]:
    return list(dict.fromkeys(name for moment in run.norms.get("epochs") or [] for name in moment["sets"]))
