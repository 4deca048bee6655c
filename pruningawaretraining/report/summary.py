"""The report of a pruner: what has been reached now, as plain data and as tables.

A leaf module: it imports nothing of the library (pictures for notebooks when they are asked for), so that the facade
above and the reports below can share it.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

_LAYERS_SHOWN = 400
LAYER_COLUMNS = ("layer", "type", "in", "out", "kept", "MACs", "of dense", "parameters")
LEFT_OUT = ("kept", "type", "of dense", "in")
"""Columns that go first where a table has to be narrow."""
LEAST_NAME = 30
"""Characters that a column of names keeps for them."""


def si(value: float | None, unit: str = "") -> str:
    """A count with three significant digits and a decimal prefix: ``1234567 -> '1.23M'``; None is a dash."""
    if value is None:
        return "–"
    number, prefix = float(value), ""
    for candidate in ("k", "M", "G", "T"):
        if abs(number) < 999.5:
            break
        number, prefix = number / 1000.0, candidate
    digits = f"{number:.0f}" if (not prefix and number.is_integer()) or abs(number) >= 99.95 else f"{number:.3g}"
    return f"{digits}{prefix}{unit}"


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in [0, 1] as a percentage: ``0.4987 -> '49.9%'``; None is a dash."""
    return "–" if value is None else f"{100.0 * value:.{digits}f}%"


def fraction(kept: float | None, dense: float | None) -> float | None:
    """kept / dense, or None when either is unknown or dense is 0."""
    return None if kept is None or not dense else kept / dense


def wrapped_name(name: str, width: int) -> str:
    """A dotted name in lines of at most ``width`` characters, broken after dots alone."""
    lines = [""]
    for part in re.findall(r"[^.]+\.?|\.", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def render(renderable: RenderableType, width: int = 80) -> str:
    """The text a terminal of ``width`` columns would show, without colours and trailing blanks."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


@dataclass(frozen=True)
class Report:
    """State of pruning at one moment.

    Attributes:
        phase: "regularize", "prune", "finetune" or "done".
        sparsity: fraction of the prunable groups that is masked or removed, in [0, 1].
        macs: ``{"dense", "kept", "fraction"}``, multiply-accumulates of one forward pass.
        parameters: the same keys, counting parameters.
        layers: one dict a layer: ``name, type, set, dense_out, kept_out, dense_in, kept_in, dense_macs, kept_macs,
            parameters``; any of them may be missing or None where it means nothing.
        groups: one dict a set of coupled layers: ``number, source, dependencies, size, kept``.
        batch: rows of the example inputs, which MACs are counted for.
        masked: channels (or heads, blocks) that are masked and still in the model, in files and exports too.
        latency: the last event of a latency target, as :func:`latency_text` reads it; None without one.
    """

    phase: str
    sparsity: float
    macs: Mapping[str, Any]
    parameters: Mapping[str, Any]
    layers: Sequence[Mapping[str, Any]] = field(default_factory=list)
    groups: Sequence[Mapping[str, Any]] = field(default_factory=list)
    batch: int = 1
    masked: int = 0
    latency: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts and lists, owned by the caller and ready for JSON."""
        return {
            "phase": self.phase,
            "sparsity": float(self.sparsity),
            "macs": dict(self.macs),
            "parameters": dict(self.parameters),
            "layers": [copy.deepcopy(dict(layer)) for layer in self.layers],
            "groups": [copy.deepcopy(dict(group)) for group in self.groups],
            "batch": self.batch,
            "masked": self.masked,
            "latency": None if self.latency is None else dict(self.latency),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Shown by ``rich.print(report)``: a headline and a table of the layers, as wide as there is room."""
        yield headline(self)
        if self.layers:
            yield layer_table(self.layers, width=options.max_width)

    def __str__(self) -> str:
        return render(self)

    def _repr_html_(self) -> str:
        """Shown by notebooks: the same with a picture of the widths."""
        from pruningawaretraining.report.notebook import report_html

        rows = [layer_row(layer) for layer in self.layers[:_LAYERS_SHOWN]]
        return report_html(headline(self).plain.replace("   ", " · "), self.layers, LAYER_COLUMNS, rows)


def headline(report: Report) -> Text:
    """Two lines: the phase with the sparsity, and MACs with parameters, dense and kept; further ones for the latency
    that was reached, and for what is masked."""
    text = Text()
    text.append(report.phase, style="bold")
    text.append(f"   sparsity {percent(report.sparsity)}\n")
    macs = "MACs" if report.batch == 1 else f"MACs of a batch of {report.batch}:"
    text.append("   ".join(_kept_of(macs, report.macs) + _kept_of("parameters", report.parameters)))
    if report.latency is not None:
        text.append(f"\n{latency_text(report.latency)}")
    if report.masked:
        text.append(f"\n{not_removed(report.masked)}")
    return text


def latency_text(event: Mapping[str, Any]) -> str:
    """The latency that an event of a latency target has reached, with its confidence interval.

    Args:
        event: ``predicted_ms``, ``measured_ms`` and ``dense_ms``; ``low_ms``, ``high_ms``, ``spread`` and ``is_noisy``
            where they are known.
    """
    dense, low, high = event["dense_ms"], event.get("low_ms"), event.get("high_ms")
    interval = "" if low is None or high is None else f"{low / dense:.3f} to {high / dense:.3f}"
    if event.get("is_noisy"):
        share = event["predicted_ms"] / dense
        noise = f"not measured: the machine is noisy, {interval}, spread {percent(event.get('spread'), 0)}"
        return f"latency {event['predicted_ms']:.4g} of {dense:.4g} ms predicted ({share:.3f}; {noise})"
    share = event["measured_ms"] / dense
    sure = f"; 95%: {interval}" if interval else ""
    return f"latency {event['measured_ms']:.4g} of {dense:.4g} ms ({share:.3f}{sure})"


def not_removed(masked: int) -> str:
    """Advice for channels that are masked but not yet removed."""
    return f"{masked} channels masked, not removed: call pruner.remove()"


def _kept_of(label: str, count: Mapping[str, Any]) -> list[str]:
    """``['MACs 40.1M of 81.2M (49.4%)']``, or nothing when the count is unknown."""
    dense, kept = count.get("dense"), count.get("kept")
    if dense is None or kept is None:
        return []
    return [f"{label} {si(kept)} of {si(dense)} ({percent(count.get('fraction', fraction(kept, dense)))})"]


def layer_table(layers: Sequence[Mapping[str, Any]], title: str | None = None, width: int = 80) -> Table:
    """One row a layer: widths, MACs and parameters, dense and kept.

    Args:
        layers: as in a :class:`Report`.
        title: above the table.
        width: in characters; the least important columns are left out where it is too small.
    """
    rows = [layer_row(layer) for layer in layers[:_LAYERS_SHOWN]]
    most = [max(map(len, cells)) for cells in zip(LAYER_COLUMNS, *rows, strict=True)]
    shown, name_width = list(range(len(most))), 0
    for left_out in (None, *LEFT_OUT):
        shown = [one for one in shown if LAYER_COLUMNS[one] != left_out]
        name_width = width - 2 - sum(most[one] + 3 for one in shown[1:])
        if name_width >= min(most[0], LEAST_NAME):
            break
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for one in shown:
        table.add_column(LAYER_COLUMNS[one], justify="left" if one < 2 else "right", no_wrap=one > 0, overflow="fold")
    for name, *cells in rows:
        table.add_row(Text(wrapped_name(name, name_width)), *(Text(cells[one - 1]) for one in shown[1:]))
    if len(layers) > _LAYERS_SHOWN:
        table.add_row(f"... and {len(layers) - _LAYERS_SHOWN} more", *[""] * (len(shown) - 1))
    return table


def layer_row(layer: Mapping[str, Any]) -> list[str]:
    """The cells of one layer: name, type, in, out, kept (%), MACs, MACs of dense (%), parameters."""
    outs = (layer.get("kept_out"), layer.get("dense_out"))
    macs = (layer.get("kept_macs"), layer.get("dense_macs"))
    return [
        str(layer.get("name", "?")),
        str(layer.get("type") or "–"),
        arrow(layer.get("dense_in"), layer.get("kept_in")),
        arrow(outs[1], outs[0]),
        percent(fraction(*outs), 0),
        si(macs[0] if macs[0] is not None else macs[1]),
        percent(fraction(*macs), 0),
        si(layer.get("parameters")),
    ]


def arrow(dense: int | None, kept: int | None) -> str:
    """``'64 → 32'``; a width that did not change is shown once."""
    if dense is None or kept is None or dense == kept:
        value = dense if kept is None else kept
        return "–" if value is None else str(value)
    return f"{dense} → {kept}"
