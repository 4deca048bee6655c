"""The family of a run: accuracy against what each member costs, the dense model beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from pruningawaretraining.report.figures import Figure
from pruningawaretraining.report.summary import percent, si
from pruningawaretraining.report.svg import Format, LineChart, Series, line_chart
from pruningawaretraining.report.tables import byte_count, milliseconds

COSTS: tuple[tuple[str, str, Format], ...] = (
    ("latency_ms", "Latency", milliseconds),
    ("macs", "MACs", si),
    ("bytes", "Size", byte_count),
)
"""Key of a line, heading, and its value as text."""
AIR = 0.12  # of the range of an axis, beside the outermost points


def lines(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The dense model and every member; nothing without a family."""
    members = summary.get("family") or []
    dense = {"name": "dense", "file": "dense.safetensors", "onnx": None, **(summary.get("dense") or {})}
    return [dense, *members] if members else []


def rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The same as texts, each cost with its share of the dense model's."""
    found = lines(summary)
    return [
        {
            "name": str(one["name"]),
            "accuracy": percent(one.get("accuracy"), 2),
            **{key: _cost(one.get(key), found[0].get(key), text) for key, _, text in COSTS},
            "files": ", ".join(str(one[key]) for key in ("file", "onnx") if one.get(key)),
        }
        for one in found
    ]


def _cost(value: float | None, dense: float | None, text: Format) -> str:
    if value is None:
        return "–"
    return text(value) if not dense or value == dense else f"{text(value)} ({percent(value / dense)})"


def figures(summary: Mapping[str, Any]) -> list[Figure]:
    """Accuracy against latency, MACs and size; a cost that was not measured has no picture."""
    found = [one for one in lines(summary) if one.get("accuracy") is not None]
    return [
        _figure(key, heading, text, known)
        for key, heading, text in COSTS
        if len(known := [one for one in found if one.get(key) is not None]) > 1
    ]


def _figure(key: str, heading: str, text: Format, known: list[dict[str, Any]]) -> Figure:
    series = []
    for style, own in (
        ("s-dense", [one for one in known if one["name"] == "dense"]),
        ("s-kept", sorted((one for one in known if one["name"] != "dense"), key=lambda one: float(one[key]))),
    ):
        if own:
            points = [(float(one[key]), float(one["accuracy"])) for one in own]
            series.append(Series(style, points, style, [str(one["name"]) for one in own]))
    costs, accuracies = ([float(one[name]) for one in known] for name in (key, "accuracy"))
    chart = LineChart(
        f"Accuracy against {heading.lower()}",
        series,
        y_format=lambda value: percent(value, 1),
        y_range=_wide(accuracies, 1.0),
        x_label=heading,
        x_format=text,
        whole=False,
        x_range=_wide(costs),
    )
    return Figure(
        f"Accuracy against {heading[0].lower() + heading[1:] if heading != 'MACs' else heading}", line_chart(chart)
    )


def _wide(values: list[float], most: float = float("inf")) -> tuple[float, float]:
    """Limits of an axis with room beside the outermost values."""
    air = AIR * (max(values) - min(values)) or 0.1 * abs(max(values)) or 1.0
    return max(0.0, min(values) - air), min(most, max(values) + air)


def family_table(summary: Mapping[str, Any]) -> Table:
    """The family for the terminal."""
    table = Table(title="family", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("")
    for heading in ("accuracy", *(heading.lower() if heading != "MACs" else heading for _, heading, _ in COSTS)):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows(summary):
        table.add_row(row["name"], row["accuracy"], *(row[key] for key, _, _ in COSTS))
    return table
