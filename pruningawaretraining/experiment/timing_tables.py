"""Output of ``pat latency``: tables, and what to say of a noisy machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pruningawaretraining.experiment.timing import Timed
from pruningawaretraining.report.summary import percent, si

ANY_WIDTH = 10_000
"""Of a terminal in which every table fits."""


def timing_tables(rows: Sequence[Timed], title: str, width: int, batch: int = 1) -> list[Table]:
    """One row a model; two tables, times and what models cost, where one is wider than the terminal.

    Args:
        rows: one of each model.
        title: above the first.
        width: of the terminal, in characters.
        batch: rows of the inputs, which MACs and memory are of.
    """
    times = {
        "ms": [f"{one.median_ms:.3g}" for one in rows],
        "p10 to p90": [f"{one.p10:.3g} to {one.p90:.3g}" for one in rows],
        "of dense": [f"{one.ratio:.3f}" for one in rows],
        "95% interval": [one.interval for one in rows],
        "accuracy": [percent(one.accuracy, 2) for one in rows],
    }
    costs = {
        "MACs" if batch == 1 else "MACs/batch": [si(one.macs) for one in rows],
        "parameters": [si(one.parameters) for one in rows],
        "peak memory": [si(one.peak_bytes, "B") for one in rows],
        "on disk": [si(one.bytes, "B") for one in rows],
    }
    names = [one.name for one in rows]
    accuracy = times.pop("accuracy")
    whole = _table(title, names, {**times, **costs, "accuracy": accuracy})
    if Console(width=ANY_WIDTH).measure(whole).maximum <= width:
        return [whole]
    return [_table(title, names, {**times, "accuracy": accuracy}), _table("", names, costs)]


def noise_text(rows: Sequence[Timed]) -> str:
    """A warning that the machine was busy; "" on a quiet one."""
    noisy = [one for one in rows if one.is_noisy]
    if not noisy:
        return ""
    worst = max(noisy, key=lambda one: (one.p90 - one.p10) / one.median_ms)
    spread = percent((worst.p90 - worst.p10) / worst.median_ms, 0)
    return (
        f"The machine is noisy: times of {worst.name} spread by {spread} of their median (10th to 90th percentile). "
        "Trust the ratios within their intervals, not the milliseconds; use a quiet machine or more --repeats."
    )


def _table(title: str, names: Sequence[str], columns: Mapping[str, Sequence[str]]) -> Table:
    table = Table(title=Text(title) if title else None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("model", overflow="fold")
    for heading, cells in columns.items():
        table.add_column(heading, justify="right", no_wrap=True, min_width=max(map(len, (heading, *cells))))
    for row in zip(names, *columns.values(), strict=True):
        table.add_row(*map(Text, row))
    return table
