"""The family of a run: accuracy against what each member costs, the dense model beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    if members and "dense_latency_ms" in members[0]:  # measured where the members were
        dense["latency_ms"] = members[0]["dense_latency_ms"]
    return [dense, *members] if members else []


def setting_text(summary: Mapping[str, Any]) -> str:
    """Where latency was measured: "latency: onnxruntime, batch 16, 1 thread"; nothing without a measurement."""
    setting = next((one["measured_on"] for one in lines(summary) if one.get("measured_on")), None)
    if setting is None:
        return ""
    threads = setting["threads"]
    return f"latency: {setting['runtime']}, batch {setting['batch']}, {threads} thread{'s' if threads > 1 else ''}"


def rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The same as texts, each cost with its share of the dense model's."""
    found = lines(summary)
    return [
        {
            "name": str(one["name"]),
            "accuracy": percent(one.get("accuracy"), 2),
            **{key: _cost(one.get(key), found[0].get(key), text) for key, _, text in COSTS},
            **_latency(one),
            "promised": _promised(one.get("target") or {}),
            "interval": _interval(one.get("interval")),
            "files": ", ".join(str(one[key]) for key in ("file", "onnx") if one.get(key)),
        }
        for one in found
    ]


def _latency(one: Mapping[str, Any]) -> dict[str, str]:
    """A member's latency with its ratio to the dense model's, which is taken turn by turn."""
    if one.get("latency_ms") is None or one.get("ratio") is None:
        return {}
    return {"latency_ms": f"{milliseconds(one['latency_ms'])} ({percent(one['ratio'])})"}


def _promised(target: Mapping[str, float]) -> str:
    """The latency that a member was made for."""
    promises = [percent(target["latency"])] if "latency" in target else []
    promises += [milliseconds(target["latency_ms"])] if "latency_ms" in target else []
    return " and ".join(promises) or "–"


def _interval(found: Sequence[float] | None) -> str:
    return f"{100 * found[0]:.1f} to {percent(found[1])}" if found else "–"


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
    found, where = rows(summary), setting_text(summary)
    promised = any(one["promised"] != "–" for one in found)
    title = f"family ({where})" if where else "family"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("")
    for heading in ("accuracy", *(heading.lower() if heading != "MACs" else heading for _, heading, _ in COSTS)):
        table.add_column(heading, justify="right", no_wrap=True)
    if promised:
        table.add_column("asked", justify="right", no_wrap=True)
    for row in found:
        if row["interval"] != "–":
            row["latency_ms"] += "\n" + row["interval"]
        cells = [row["name"], row["accuracy"], *(row[key] for key, _, _ in COSTS)]
        table.add_row(*cells, *([row["promised"]] if promised else []))
    return table
