"""Timing: of single layers, of whole models, and of several in turns. Every latency of the library is measured here.

Several models are timed in turns, so that a change of the machine's speed during the measurement hits all of them
alike. In a turn each model runs several times in a row (its caches are warm, as in use), and the 10th percentile of
these runs is its time: disturbances only make runs longer. Models are compared turn by turn: a ratio is the median over
the turns, and its interval holds the true median with 95% confidence. Where that interval is wide, the machine is too
noisy to promise milliseconds, and that is said.

The clock counts the time that the calling thread ran, where all work is done on it; else the time that went by.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pruningawaretraining import registry
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.runtimes.runtime import Clock, Model, Run, Runtime, clock_of, name_of_runtime

__all__ = [
    "Clock",
    "Latency",
    "LatencyComparison",
    "Model",
    "Pace",
    "Ratio",
    "Run",
    "Runtime",
    "clock_of",
    "compare_latency",
    "decile",
    "is_wide",
    "least_ms",
    "measure_latency",
    "pace_of",
    "ratio_in_turns",
    "ratio_of",
    "time_in_turns",
    "timed_ms",
]

LEAST_RUNS, MOST_RUNS, LAYER_MS = 3, 20, 4.0
"""Of a single layer: runs, and the time that is spent on it."""
FEWEST, MOST, SPENT_MS = 15, 100, 1500.0
"""Of whole models: turns, and the time that is spent on them."""
LEAST_WITHIN, MOST_WITHIN, WITHIN_MS = 2, 10, 20.0
"""Of one model in one turn: runs, and the time that is spent on them."""
AGAIN = 3
"""Measurements in all before a ratio is called noisy."""
NOISY = 0.03
"""Half of a ratio's interval, as a fraction of the ratio, beyond which milliseconds cannot be promised."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass.

    Attributes:
        median_ms: median over the turns, milliseconds; the time of a turn is the 10th percentile of the runs in it.
        p10: 10th percentile over the turns, milliseconds.
        p90: 90th percentile over the turns, milliseconds.
        runs: number of turns.
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
class Pace:
    """How a measurement is spread over time.

    Attributes:
        turns: how often every model has its turn.
        within: runs of a model in one turn.
    """

    turns: int
    within: int


@dataclass(frozen=True)
class Ratio:
    """The ratio of one model's time to another's, measured in turns.

    Attributes:
        value: median over the turns of one time divided by the other: 0.5 is twice as fast.
        low, high: its 95% confidence interval.
        spread: from the 10th to the 90th percentile of the other model's turns, as a fraction of their median.
        turns: number of turns.
    """

    value: float
    low: float
    high: float
    spread: float
    turns: int

    @property
    def is_noisy(self) -> bool:
        """Whether the interval is too wide to promise milliseconds."""
        return is_wide(self.value, self.low, self.high)


def is_wide(ratio: float, low: float, high: float) -> bool:
    """Whether the interval of a ratio is too wide to promise milliseconds."""
    return (high - low) / 2 > NOISY * ratio


@dataclass(frozen=True)
class LatencyComparison:
    """Latencies that were measured in turns.

    Attributes:
        latencies: one for each name, in the order given.
        ratios: the time of each divided by that of the model it is compared with, the median over the turns: 0.5 is
            twice as fast.
        intervals: the 95% confidence intervals of the ratios.
    """

    latencies: dict[str, Latency]
    ratios: dict[str, float]
    intervals: dict[str, tuple[float, float]]

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
        repeats: turns, at least 1; each of them is the 10th percentile of several runs.
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
    against: Mapping[str, str] | None = None,
) -> LatencyComparison:
    """Time several models in turns: a few runs of each, again and again.

    Args:
        models: ``{name: (model, example_inputs)}``.
        runtime, threads, repeats, warmup: as in :func:`measure_latency`, the same for all.
        against: which model each is compared with, by their names; the first where it says nothing.

    Raises:
        ConfigError, ModelError: as in :func:`measure_latency`; ConfigError too without a model.
    """
    _check_numbers(models, threads=threads, repeats=repeats, warmup=warmup)
    name = name_of_runtime(runtime)
    built: Runtime = registry.build("runtime", runtime)
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(built.prepare(model, given, threads)) for model, given in models.values()]
        clock = clock_of(built, threads, [model for model, _ in models.values()])
        for run in runs * warmup:
            run()
        pace = dataclasses.replace(pace_of(runs, clock), turns=repeats)
        taken = dict(zip(models, time_in_turns(runs, pace, clock), strict=True))
    latencies = {key: _latency(times, name, threads) for key, times in taken.items()}
    first = next(iter(taken))
    found = {key: ratio_of(taken[(against or {}).get(key, first)], one) for key, one in taken.items()}
    intervals = {key: (one.low, one.high) for key, one in found.items()}
    return LatencyComparison(latencies, {key: one.value for key, one in found.items()}, intervals)


def _check_numbers(models: Mapping[str, Any], **numbers: int) -> None:
    if not models:
        raise ConfigError("models: {} is empty; give at least one {name: (model, example_inputs)}")
    for key, value in numbers.items():
        least = 0 if key == "warmup" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{key}: {value!r} is not a whole number of at least {least}")


def time_in_turns(runs: Sequence[Run], pace: Pace, clock: Clock) -> list[list[float]]:
    """Milliseconds of every turn, for each of the functions: the 10th percentile of its runs in that turn."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(pace.turns):
        for run, taken in zip(runs, times, strict=True):
            taken.append(decile([timed_ms(run, clock) for _ in range(pace.within)]))
    return times


def timed_ms(run: Callable[[], object], clock: Clock) -> float:
    """Milliseconds of one run."""
    start = clock()
    run()
    return (clock() - start) * 1e3


def pace_of(runs: Sequence[Run], clock: Clock) -> Pace:
    """Warm up, and say how many turns of how many runs :data:`SPENT_MS` is enough for, within bounds.

    All functions run equally often in a turn, as the slowest: a percentile of more runs would be lower.
    """
    for run in (*runs, *runs):
        run()
    least = [min(timed_ms(run, clock) for _ in range(3)) for run in runs]
    within = min(max(round(WITHIN_MS / max(*least, 1e-3)), LEAST_WITHIN), MOST_WITHIN)
    turn = math.fsum(least) * within
    return Pace(int(min(max(SPENT_MS / max(turn, 1e-3), FEWEST), MOST)), within)


def least_ms(run: Callable[[], object], clock: Clock) -> float:
    """Minimum over several runs of a layer: disturbances only make runs longer."""
    run()
    found: list[float] = []
    while len(found) < LEAST_RUNS or (math.fsum(found) < LAYER_MS and len(found) < MOST_RUNS):
        found.append(timed_ms(run, clock))
    return min(found)


def ratio_in_turns(reference: Run, other: Run, clock: Clock) -> Ratio:
    """The time of ``other`` divided by that of ``reference``; measured longer, within limits, while it is uncertain."""
    runs = [reference, other]
    pace = pace_of(runs, clock)
    times: list[list[float]] = [[], []]
    found = None
    for _ in range(AGAIN):
        for taken, more in zip(times, time_in_turns(runs, pace, clock), strict=True):
            taken += more
        found = ratio_of(*times)
        if not found.is_noisy:
            break
    assert found is not None
    return found


def ratio_of(reference: Sequence[float], other: Sequence[float]) -> Ratio:
    """The ratio of times that were taken in turns, turn by turn.

    The interval lies between two order statistics: how many turns fall below the true median is binomial, whatever the
    times are like.
    """
    turns = len(reference)
    ordered = sorted(right / max(left, 1e-9) for left, right in zip(reference, other, strict=True))
    below = _passed_over(turns)
    spread = (decile(reference, 9) - decile(reference)) / max(statistics.median(reference), 1e-9)
    return Ratio(statistics.median(ordered), ordered[below], ordered[turns - 1 - below], spread, turns)


def _passed_over(turns: int) -> int:
    """How many of the smallest (and largest) ratios lie outside the interval, at 95% confidence."""
    missed, count = 2 * 0.5**turns, 0
    while (missed := missed + 2 * math.comb(turns, count + 1) * 0.5**turns) <= 1 - CONFIDENCE:
        count += 1
    return count


def decile(times: Sequence[float], which: int = 1) -> float:
    """The 10th percentile, which disturbances change least: they only make runs longer. Or another tenth."""
    return statistics.quantiles(times, n=10, method="inclusive")[which - 1] if len(times) > 1 else times[0]


def _latency(times: list[float], runtime: str, threads: int) -> Latency:
    return Latency(statistics.median(times), decile(times), decile(times, 9), len(times), runtime, threads)
