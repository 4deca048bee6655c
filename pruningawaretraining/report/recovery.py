"""The effect of each part of a run's recovery, as far as it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pruningawaretraining.report.summary import percent

UNKNOWN = "not known without another training"


def rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for each part: what it was, and what it came to; nothing without a recovery."""
    found = summary.get("recovery")
    if not found:
        return []
    options = ((summary.get("config") or {}).get("pruning") or {}).get("recovery") or {}
    if found.get("began") is None:
        return [_row("recovery", "pruning was not over before the training", "nothing but distillation, if any")]
    return [
        *(_rate(options["rate"], found) if options.get("rate") else []),
        *(_budget(found) if found.get("budget", "epochs") != "epochs" else []),
        *(_average(options.get("average") or {}, found) if found.get("average") else []),
        *(_distillation(options["distillation"]) if options.get("distillation") else []),
    ]


def _row(part: str, what: str, came_to: str) -> dict[str, str]:
    return {"part": part, "what": what, "came_to": came_to}


def _rate(options: Mapping[str, Any], found: Mapping[str, Any]) -> list[dict[str, str]]:
    warm = f", warm-up of {options['warmup']:g} epochs" if options.get("warmup") else ""
    times = f", times {options['peak']:g}" if options.get("peak", 1) != 1 else ""
    begins = "at every event" if options.get("at") == "events" else f"from epoch {found['began']} on"
    what = f"{begins} the schedule from its epoch {options.get('to', 0):g}{times}{warm}"
    return [_row("learning rate", what, UNKNOWN)]


def _budget(found: Mapping[str, Any]) -> list[dict[str, str]]:
    costs = found.get("costs") or {}
    ratio = costs["pruned"] / costs["dense"] if costs.get("dense") else 1.0
    of = "MACs" if found["budget"] == "macs" else "time of a step"
    came_to = f"{found['epochs'] - found['planned_epochs']} more epochs, {found['epochs']} in all"
    return [_row("budget", f"{percent(ratio)} of the dense model's {of}", came_to)]


def _average(options: Mapping[str, Any], found: Mapping[str, Any]) -> list[dict[str, str]]:
    one = found["average"]
    kind = f"ema, decay {options['decay']:g}" if options.get("type") == "ema" else str(options.get("type", "average"))
    came_to = f"{percent(found['last'], 2)} → {percent(one['accuracy'], 2)}"
    if one["unmeasured"] != one["accuracy"]:
        came_to += f" ({percent(one['unmeasured'], 2)} with the norms of the last weights)"
    return [_row("average", f"{kind}, from epoch {one['from']} on", came_to)]


def _distillation(options: Mapping[str, Any]) -> list[dict[str, str]]:
    what = f"weight {options.get('weight', 1):g}, temperature {options.get('temperature', 2):g}, from the first step on"
    return [_row("distillation", what, UNKNOWN)]
