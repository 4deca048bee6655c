"""What the parts of benchmarks/gpu.py share: a device, clocks, and rows of the table.

With ``tiny`` the same code runs in seconds on a CPU, and its figures mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """Where, and how much.

    Args:
        device: where.
        tiny: whether sizes are such that a CPU is done in seconds.
    """

    device: torch.device
    tiny: bool = False

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def waited(self, run: Run) -> Run:
        """A function that runs another and waits for the device."""

        def both() -> None:
            run()
            self.sync()

        return both

    def seconds(self, run: Run) -> float:
        """Of one run, waited for."""
        self.sync()
        start = time.perf_counter()
        run()
        self.sync()
        return time.perf_counter() - start

    def milliseconds(self, run: Run, repeats: int = 20) -> float:
        """What one run takes on the device: between two of its events, over many runs in a row; on a CPU by the clock.

        Runs that the host cannot launch as fast as the device works through them take the host's time.
        """
        for _ in range(3):
            run()
        if self.device.type != "cuda":
            return 1e3 * self.seconds(run)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            run()
        last.record()
        self.sync()
        return float(first.elapsed_time(last)) / repeats


def row(measured: str, found: float, unit: str, goal: float | None = None, **beside: Any) -> dict[str, Any]:
    """A row of the table.

    Args:
        measured: what.
        found: how much.
        unit: of ``found`` and of the goal.
        goal: the most that it should be; a speed-up's unit is "times faster", and it should be at least that.
        beside: what it is compared with, by name.
    """
    text = ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in beside.items())
    least = unit == "times faster"
    met = "" if goal is None else "yes" if (found >= goal if least else found <= goal) else "no"
    bound = "" if goal is None else f"{'at least' if least else 'at most'} {goal:g}"
    return {"measured": measured, "found": _short(found), "unit": unit, "goal": bound, "met": met, "beside": text}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
