"""What the benchmarks share: interleaved timing, environment, and results as JSON and on the pages that show them."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from make_docs import HERE, RESULTS, write_pages

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
        "command": " ".join(["python", _script(), *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU",
        "python": platform.python_version(),
        "versions": found,
    }


def _script() -> str:
    """The running script, as seen from the root of the repository."""
    path = Path(sys.argv[0]).resolve()
    return path.relative_to(HERE.parent).as_posix() if path.is_relative_to(HERE.parent) else path.name


def save(
    name: str,
    rows: list[dict[str, Any]],
    title: str,
    note: str = "",
    command: str = "",
    kept: Mapping[str, Any] | None = None,
) -> Path:
    """Write a benchmark's rows as JSON, with what is needed to repeat it, and the pages that show them.

    Args:
        name: of the file in ``results/``.
        rows: the table.
        title: its heading.
        note: what stands below it.
        command: what makes the table again; the one that was given by default.
        kept: what the benchmark itself reads back from the file beside the table.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    found = {"name": name, "title": title, "note": note, **environment(), "rows": rows}
    found |= {"command": command} if command else {}
    path.write_text(json.dumps({**found, **(kept or {})}, indent=1) + "\n")
    write_pages()
    return path


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(str(row.get(key, "")) for key in keys) + " |" for row in rows]
    return "\n".join(lines)


def add_penalties(engine: Any) -> None:
    """Add every active regulariser of an engine to the gradients."""
    for ready, factor_G in engine.gradient_penalties():
        ready.add(factor_G)
