"""The HTML report of a run: one file, no script, nothing loaded from elsewhere; light and dark, wide and narrow."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pruningawaretraining.files import reading, write_text
from pruningawaretraining.report import coupling, family, figures, recovery, tables
from pruningawaretraining.report.nouns import Units, units_of
from pruningawaretraining.report.numbers import write_numbers
from pruningawaretraining.report.run import REPORT, SUMMARY, Phase, Run, load_run
from pruningawaretraining.report.summary import arrow, fraction, percent, si

logger = logging.getLogger(__name__)
TEMPLATES = Path(__file__).parent / "templates"


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run's folder from the files that the run wrote there.

    Args:
        run_dir: the folder; it must hold ``summary.json``, and may hold ``metrics.jsonl``, ``norms.json`` and
            ``config.yaml``. Missing files are left out of the report.

    Returns:
        The path of the report.

    Raises:
        CheckpointError: the folder holds no summary, or a file in it is damaged.
    """
    path = Path(run_dir) / REPORT
    run = load_run(run_dir)
    with reading(Path(run_dir) / SUMMARY):
        text = render_report(run)
    write_text(path, text)
    write_numbers(run, Path(run_dir))
    logger.info("%s: %.0f kB", path, len(text) / 1e3)
    return path


def render_report(run: Run) -> str:
    """The page as text; see :func:`write_report`."""
    return render_template("report.html.j2", page(run))


def render_template(name: str, values: Mapping[str, Any]) -> str:
    """One of the pages of this package, filled in."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(si=si, percent=percent, bytes=tables.byte_count, ms=tables.milliseconds)
    return environment.get_template(name).render(values)


def page(run: Run) -> dict[str, Any]:
    """Everything that the template shows."""
    summary = run.summary
    pruning = summary.get("pruning") or {}
    layers, groups = pruning.get("layers") or [], pruning.get("groups") or []
    latency = summary.get("latency") or {}
    links = tables.chain(summary)
    found = units_of(summary)
    return {
        "name": summary.get("name") or "run",
        "version": summary.get("version"),
        "about": _about(summary),
        "rows": tables.compared_rows(summary),
        "verdict": _verdict(links),
        "family": family.rows(summary),
        "family_setting": family.setting_text(summary),
        "family_figures": family.figures(summary),
        "recovery": recovery.rows(summary),
        "phases": [_phase(phase, found) for phase in run.phases],
        "units": found,
        "timeline": figures.timeline(run),
        "norms": figures.norms(run),
        "latency": latency,
        "latency_figure": figures.latency(latency),
        "links": links,
        "verification": summary.get("verification") or {},
        "coupling": coupling.picture(layers if found.removed else []),
        "layers": [_layer(layer) for layer in layers],
        "groups": [_group(group) for group in groups],
        "pruning": pruning,
        "environment": _flat({**(summary.get("environment") or {}), "pruningawaretraining": summary.get("version")}),
        "data": _flat(summary.get("data") or {}),
        "config": run.config if run.config.strip() not in ("", "{}") else "",
        "files": summary.get("files") or [],
    }


def _about(summary: Mapping[str, Any]) -> list[str]:
    """The line under the title: data, epochs, duration, date."""
    data, epochs = summary.get("data") or {}, summary.get("epochs")
    parts = [
        str(data["name"]) if data.get("name") else "",
        f"{epochs} epochs" if epochs else "",
        duration(summary.get("seconds")),
        str(summary.get("date") or "")[:16].replace("T", " "),
    ]
    return [part for part in parts if part]


def duration(seconds: float | None) -> str:
    """``93.1 -> '1 min 33 s'``; nothing for None."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def _verdict(links: Sequence[tables.Link]) -> str:
    """ "ok", "failed", or "" when nothing was verified."""
    known = [link.holds for link in links if link.holds is not None]
    return "" if not known else "ok" if all(known) else "failed"


def _phase(phase: Phase, units: Units) -> dict[str, Any]:
    span = f"epoch {phase.first}" if phase.first == phase.last else f"epochs {phase.first}–{phase.last}"
    return {"name": phase.name, "span": span, "meaning": units.meaning(phase.name)}


def _layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the table of layers."""
    return {
        "name": layer.get("name", "?"),
        "type": layer.get("type") or "–",
        "set": layer.get("set") or "",
        "in": arrow(layer.get("dense_in"), layer.get("kept_in")),
        "out": arrow(layer.get("dense_out"), layer.get("kept_out")),
        "kept": fraction(layer.get("kept_out"), layer.get("dense_out")),
        "dense_macs": layer.get("dense_macs"),
        "kept_macs": layer.get("kept_macs"),
        "macs_share": fraction(layer.get("kept_macs"), layer.get("dense_macs")),
        "parameters": layer.get("parameters"),
    }


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the coupled sets: width, what is kept, who is coupled."""
    return {
        "number": group.get("number", ""),
        "source": group.get("source", "?"),
        "dependencies": [str(name) for name in group.get("dependencies") or []],
        "size": group.get("size"),
        "kept": group.get("kept"),
        "share": fraction(group.get("kept"), group.get("size")),
    }


def _flat(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Key and value as text; what is unknown is left out."""

    def text(value: Any) -> str:
        return " × ".join(str(item) for item in value) if isinstance(value, (list, tuple)) else str(value)

    return [(key, text(value)) for key, value in values.items() if value is not None]
