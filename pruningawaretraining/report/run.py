"""A finished run, read from its folder: summary, metrics by epoch, and norms; the last two may be missing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.files import as_object, parse_json, read_object, read_text

SUMMARY, METRICS, NORMS, CONFIG, REPORT = "summary.json", "metrics.jsonl", "norms.json", "config.yaml", "report.html"


@dataclass(frozen=True)
class Phase:
    """Consecutive epochs, first and last included, in one phase of the pruner."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class Run:
    """Files of a run.

    Attributes:
        summary: what it came to; any key may be missing.
        metrics: one dict an epoch and model, in order.
        norms: ``{"edges": [...], "epochs": [...]}``, or empty.
        config: text of the resolved config.
    """

    summary: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]] = ()
    norms: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""

    def lines_of(self, model: str) -> list[Mapping[str, Any]]:
        """The metrics of one model, "dense" or "pruned", in order of the epoch; of a repeated epoch the last counts."""
        found = {line["epoch"]: line for line in self.metrics if line.get("model") == model and "epoch" in line}
        return [found[epoch] for epoch in sorted(found)]

    @property
    def phases(self) -> list[Phase]:
        """The phases of the pruned model's training."""
        return phases_of(self.lines_of("pruned"))


def phases_of(lines: Sequence[Mapping[str, Any]]) -> list[Phase]:
    """Epochs with the same phase in a row, merged."""
    phases: list[Phase] = []
    for line in lines:
        name, epoch = str(line.get("phase", "train")), int(line["epoch"])
        if phases and phases[-1].name == name:
            phases[-1] = Phase(name, phases[-1].first, epoch)
        else:
            phases.append(Phase(name, epoch, epoch))
    return phases


def load_run(folder: str | Path, *, finished: bool = True) -> Run:
    """Read a run's folder.

    Args:
        folder: of the run.
        finished: whether it must be; otherwise what there is of it is read.

    Raises:
        CheckpointError: the summary is missing, or a file is damaged.
    """
    folder = Path(folder)
    if finished and not (folder / SUMMARY).is_file():
        raise CheckpointError(f"run: {str(folder)!r} holds no {SUMMARY}; give the folder of a finished run")
    ended = (folder / SUMMARY).is_file()
    summary = read_object(folder / SUMMARY) if ended else {}
    metrics, norms, config = folder / METRICS, folder / NORMS, folder / CONFIG
    lines = read_text(metrics).splitlines() if metrics.is_file() else []
    text = read_text(config) if config.is_file() else json.dumps(summary.get("config", {}), indent=2)
    return Run(
        summary,
        [as_object(parse_json(line, metrics), metrics) for line in lines if line.strip()],
        read_object(norms) if norms.is_file() else {},
        text,
    )
