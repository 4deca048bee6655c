"""The numbers of a run as rows: the same for the terminal and for the HTML report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from pruningawaretraining.report.nouns import units_of
from pruningawaretraining.report.summary import fraction, percent, si


@dataclass(frozen=True)
class Compared:
    """One quantity of the dense and the pruned model.

    Attributes:
        label: what it is.
        dense: its value as text; a dash if unknown.
        pruned: the same for the pruned model.
        change: the difference as text.
        good: whether the change is an improvement; None if unknown or unchanged.
        share: pruned / dense; None if unknown or not meaningful.
        note: what else is to be said.
    """

    label: str
    dense: str
    pruned: str
    change: str
    good: bool | None = None
    share: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Link:
    """One link of the verification chain: what is compared, the largest difference, and whether it is small enough."""

    left: str
    right: str
    difference: float | None
    relative: float | None
    holds: bool | None


def byte_count(value: float | None) -> str:
    """``1536 -> '1.54 kB'``."""
    return si(value, "B") if value is None or value < 999.5 else f"{si(value)[:-1]} {si(value)[-1]}B"


def milliseconds(value: float | None) -> str:
    """``0.1234 -> '0.123 ms'``."""
    return "–" if value is None else f"{value:.3g} ms"


def compared_rows(summary: Mapping[str, Any]) -> list[Compared]:
    """Accuracy, MACs, parameters, size and latency of the dense and the pruned model; what neither has is left out."""
    dense, pruned = summary.get("dense") or {}, summary.get("pruned") or {}
    sizes: list[tuple[str, str, Callable[[float | None], str]]] = [
        ("MACs", "macs", si),
        ("Parameters", "parameters", si),
        ("File size", "bytes", byte_count),
        ("Latency", "latency_ms", milliseconds),
    ]
    rows = [_accuracy(dense.get("accuracy"), pruned.get("accuracy"))]
    rows += [_size(label, dense.get(key), pruned.get(key), text) for label, key, text in sizes]
    rows[1:1] = _zeros(summary)
    rows[-1:] = _latencies(rows[-1], summary.get("latency") or {})
    return [row for row in rows if (row.dense, row.pruned) != ("–", "–")]


def _latencies(measured: Compared, found: Mapping[str, Any]) -> list[Compared]:
    """The latency at the end with its confidence interval, and the one that a latency target has reached."""
    interval, ratio = found.get("interval"), found.get("ratio")
    if interval and ratio and measured.share is not None:  # of runs in turns: the interval is that ratio's
        measured = replace(_change(measured, float(ratio)), note=_confident(*interval))
    rows = [measured]
    for event in (found.get("events") or [])[-1:]:
        noisy, dense = bool(event.get("is_noisy")), event["dense_ms"]
        row = _size("Latency at the target", dense, event["predicted_ms" if noisy else "measured_ms"], milliseconds)
        ends = [event.get(key) for key in ("low_ms", "high_ms")]
        known = "" if None in ends else _confident(*(one / dense for one in ends))
        spread = percent(event.get("spread"), 0)
        rows.append(replace(row, note=f"predicted: timing is too noisy here (spread {spread})" if noisy else known))
    return rows


def _confident(low: float, high: float) -> str:
    return f"{low:.3f} to {high:.3f} of dense (95%)"


def _zeros(summary: Mapping[str, Any]) -> list[Compared]:
    """Where rules leave zeros in the weights: how many of their groups are zero, and the weights that are not."""
    pruning = summary.get("pruning") or {}
    if not units_of(summary).zeroed or pruning.get("sparsity") is None:
        return []
    counts = pruning.get("parameters") or {}
    rows = [Compared("Sparsity", percent(0.0), percent(pruning["sparsity"]), "–")]
    return [*rows, _size("Nonzero parameters", counts.get("dense"), counts.get("kept"), si)]


def _accuracy(dense: float | None, pruned: float | None) -> Compared:
    """The change in percentage points; a loss of at most one point is neither good nor bad."""
    if dense is None or pruned is None:
        return Compared("Accuracy", percent(dense, 2), percent(pruned, 2), "–")
    points = 100.0 * (pruned - dense)
    text = "same" if abs(points) < 0.005 else f"{_signed(points, '.2f')} pt"
    good = None if -1.0 <= points < 0.005 else points > 0
    return Compared("Accuracy", percent(dense, 2), percent(pruned, 2), text, good)


def _size(label: str, dense: float | None, pruned: float | None, text: Callable[[float | None], str]) -> Compared:
    share = fraction(pruned, dense)
    row = Compared(label, text(dense), text(pruned), "–")
    return row if share is None else _change(row, share)


def _change(row: Compared, share: float) -> Compared:
    """The row with what the pruned model's value is of the dense one's."""
    percents = 100.0 * (share - 1.0)
    change = "same" if abs(percents) < 0.05 else f"{_signed(percents, '.1f')}%"
    return replace(row, change=change, good=None if change == "same" else percents < 0, share=share)


def _signed(value: float, form: str) -> str:
    """A number with its sign, a true minus."""
    return f"{'−' if value < 0 else '+'}{abs(value):{form}}"


def chain(summary: Mapping[str, Any], tolerance: float = 1e-4) -> list[Link]:
    """The verification chain, link by link; unknown links have no difference.

    Args:
        summary: the run's summary; ``verification`` holds the largest absolute differences.
        tolerance: a link holds when its difference is at most this fraction of the largest output.
    """
    found = summary.get("verification") or {}
    scale = found.get("scale")
    links = [
        ("masked", "removed", "masked_removed"),
        ("removed", "reloaded", "removed_reloaded"),
        ("reloaded", "ONNX", "reloaded_onnx"),
    ]
    return [_link(left, right, found.get(key), scale, tolerance) for left, right, key in links] if found else []


def _link(left: str, right: str, difference: float | None, scale: float | None, tolerance: float) -> Link:
    if difference is None:
        return Link(left, right, None, None, None)
    relative = difference / scale if scale else None
    return Link(left, right, difference, relative, (difference if relative is None else relative) <= tolerance)


def comparison_table(summary: Mapping[str, Any], title: str | None = None) -> Table:
    """Dense against pruned for the terminal: one row a quantity, improvements in green."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("")
    for heading in ("dense", "pruned", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    colours = {True: "green", False: "yellow", None: ""}
    for row in compared_rows(summary):
        table.add_row(row.label, row.dense, Text(row.pruned, style="bold"), Text(row.change, style=colours[row.good]))
        if row.note:
            table.add_row(Text(f"  {row.note}", style="dim"))
    return table
