"""Measured latency: median wall-clock time of one forward pass on a chosen runtime, and fair comparisons.

Several models are timed in turns (A B A B ...), so that a change of the machine's speed during the measurement hits all
of them alike. Timing needs a quiet machine all the same: read the spread between the 10th and the 90th percentile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pruningawaretraining import registry
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.runtimes.runtime import Model, Run, Runtime

__all__ = [
    "Latency",
    "LatencyComparison",
    "Model",
    "Run",
    "Runtime",
    "compare_latency",
    "measure_latency",
    "time_in_turns",
]


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one forward pass.

    Attributes:
        median_ms: median over the timed runs, milliseconds.
        p10: 10th percentile, milliseconds.
        p90: 90th percentile, milliseconds.
        runs: number of timed runs.
        runtime: name of the runtime.
        threads: threads that the runtime was given.
    """

    median_ms: float
    p10: float
    p90: float
    runs: int
    runtime: str
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """The same as a plain dict, ready for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class LatencyComparison:
    """Latencies that were measured in turns.

    Attributes:
        latencies: one for each name, in the order given.
        ratios: median of each divided by the median of the first: 0.5 is twice as fast as the first.
    """

    latencies: dict[str, Latency]
    ratios: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts, ready for JSON."""
        return dataclasses.asdict(self)


def measure_latency(
    model: Model,
    example_inputs: Any,
    runtime: str | Mapping[str, Any] | Runtime = "onnxruntime",
    threads: int = 1,
    repeats: int = 50,
    warmup: int = 10,
) -> Latency:
    """Time a model's forward pass.

    Args:
        model: a module, or the path of an ``.onnx`` file.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        runtime: a registered runtime by name, e.g. "onnxruntime" or "torch", or as ``{"type": name, **options}``.
        threads: threads within an operator, at least 1.
        repeats: timed runs, at least 1.
        warmup: runs before the clock starts.

    Raises:
        ConfigError: unknown runtime, one that is not installed, or a number out of range.
        ModelError: the model cannot be run there.
    """
    return compare_latency({"model": (model, example_inputs)}, runtime, threads, repeats, warmup).latencies["model"]


def compare_latency(
    models: Mapping[str, tuple[Model, Any]],
    runtime: str | Mapping[str, Any] | Runtime = "onnxruntime",
    threads: int = 1,
    repeats: int = 50,
    warmup: int = 10,
) -> LatencyComparison:
    """Time several models in turns: one run of each, again and again.

    Args:
        models: ``{name: (model, example_inputs)}``; ratios are to the first.
        runtime, threads, repeats, warmup: as in :func:`measure_latency`, the same for all.

    Raises:
        ConfigError, ModelError: as in :func:`measure_latency`; ConfigError too without a model.
    """
    _check_numbers(models, threads=threads, repeats=repeats, warmup=warmup)
    name = _runtime_name(runtime)
    built: Runtime = registry.build("runtime", runtime)
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(built.prepare(model, given, threads)) for model, given in models.values()]
        times = time_in_turns(runs, repeats, warmup)
    latencies = {key: _latency(taken, name, threads) for key, taken in zip(models, times, strict=True)}
    first = next(iter(latencies.values())).median_ms
    return LatencyComparison(latencies, {key: one.median_ms / first for key, one in latencies.items()})


def _check_numbers(models: Mapping[str, Any], **numbers: int) -> None:
    if not models:
        raise ConfigError("models: {} is empty; give at least one {name: (model, example_inputs)}")
    for key, value in numbers.items():
        least = 0 if key == "warmup" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{key}: {value!r} is not a whole number of at least {least}")


def _runtime_name(runtime: str | Mapping[str, Any] | Runtime) -> str:
    name = runtime.get("type") if isinstance(runtime, Mapping) else runtime
    return registry.canonical("runtime", name, "runtime") if isinstance(name, str) else type(runtime).__name__


def time_in_turns(
    runs: list[Run], repeats: int, warmup: int, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Milliseconds of every timed run, for each of the functions, by a clock that counts seconds."""
    for _ in range(warmup):
        for run in runs:
            run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, taken in zip(runs, times, strict=True):
            start = clock()
            run()
            taken.append((clock() - start) * 1e3)
    return times


def _latency(times: list[float], runtime: str, threads: int) -> Latency:
    deciles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times
    return Latency(statistics.median(times), deciles[0], deciles[-1], len(times), runtime, threads)
