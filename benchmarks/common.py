"""What the benchmarks share: interleaved timing, environment, and results as JSON."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "torch-pruning", "onnxruntime", "numpy")


def interleaved(
    functions: dict[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each function; they take turns, so a drift of the machine's speed hits all alike.

    ``clock=time.process_time`` counts CPU seconds, which other processes on the machine disturb least.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + rounds):
        for name, function in functions.items():
            start = clock()
            function()
            if turn >= warmup:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def environment() -> dict[str, Any]:
    """Machine, versions, date and command of a run."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python " + " ".join([Path(sys.argv[0]).as_posix().split("/main/")[-1], *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU",
        "python": platform.python_version(),
        "versions": found,
    }


def save(name: str, rows: list[dict[str, Any]], title: str, note: str = "", command: str = "") -> Path:
    """Write a benchmark's rows, with what is needed to repeat it, as JSON; the command is by default the one given."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    found = {"name": name, "title": title, "note": note, **environment(), "rows": rows}
    path.write_text(json.dumps({**found, **({"command": command} if command else {})}, indent=1) + "\n")
    return path


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(str(row.get(key, "")) for key in keys) + " |" for row in rows]
    return "\n".join(lines)
