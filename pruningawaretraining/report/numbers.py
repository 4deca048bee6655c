"""The numbers of a report as JSON and CSV, for those who draw their own pictures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pruningawaretraining.files import write_text
from pruningawaretraining.report import tables
from pruningawaretraining.report.run import Run

JSON, EPOCHS, LAYERS, GROUPS = "report.json", "epochs.csv", "layers.csv", "groups.csv"
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
FILES = (JSON, EPOCHS, LAYERS, GROUPS)


def numbers(run: Run) -> dict[str, Any]:
    """Everything that the page shows, as plain data."""
    summary, pruning = run.summary, run.summary.get("pruning") or {}
    chosen = (
        "name",
        "version",
        "date",
        "seconds",
        "environment",
        "data",
        "target",
        "dense",
        "pruned",
        "family",
        "latency",
    )
    return {
        **{key: summary.get(key) for key in chosen},
        "phases": [asdict(phase) for phase in run.phases],
        "epochs": [dict(line) for line in run.metrics],
        "layers": pruning.get("layers") or [],
        "groups": pruning.get("groups") or [],
        "norms": dict(run.norms),
        "verification": [asdict(link) for link in tables.chain(summary)],
        "config": summary.get("config"),
    }


def write_numbers(run: Run, folder: Path) -> None:
    """Write ``report.json``, ``epochs.csv``, ``layers.csv`` and ``groups.csv`` into a folder."""
    found = numbers(run)
    write_text(folder / JSON, json.dumps(found, indent=1) + "\n")
    for name, key in ((EPOCHS, "epochs"), (LAYERS, "layers"), (GROUPS, "groups")):
        write_text(folder / name, as_csv(found[key]))


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV under all keys that any of them has; a list is joined by spaces."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_text(key) for key in keys])
    for row in rows:
        writer.writerow([_cell(row.get(key)) for key in keys])
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        joined = " ".join(str(item) for item in value)
        return _text(joined) if any(isinstance(item, str) for item in value) else joined
    return _text(value) if isinstance(value, str) else value


def _text(value: str) -> str:
    """A text that no spreadsheet takes for a formula: names of layers and runs may be a stranger's."""
    return f"'{value}" if value.startswith(FORMULA_STARTS) else value
