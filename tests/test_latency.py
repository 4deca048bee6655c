"""Latency: structure, order of the runs and messages; how fast this machine is, is not tested."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pruningawaretraining import registry
from pruningawaretraining.costs.latency import meter
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.runtimes import timing as latency
from pruningawaretraining.runtimes.exporters import export_graph
from pruningawaretraining.runtimes.flat_model import build_graph
from pruningawaretraining.runtimes.timing import compare_latency, measure_latency

FAST = {"repeats": 5, "warmup": 1}
TRACED = {"type": "onnxruntime", "exporter": "torchscript"}


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))


INPUT = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(("runtime", "name"), [("torch", "torch"), ("eager", "torch"), (TRACED, "onnxruntime")])
def test_one_latency(runtime: Any, name: str) -> None:
    net = model().train()
    threads = torch.get_num_threads()
    result = measure_latency(net, INPUT, runtime, threads=1, **FAST)
    assert (result.runtime, result.threads, result.runs) == (name, 1, 5)
    assert 0 < result.p10 <= result.median_ms <= result.p90
    assert json.loads(json.dumps(result.to_dict()))["median_ms"] == result.median_ms
    assert torch.get_num_threads() == threads and all(module.training for module in net.modules())


def test_the_median_is_of_the_runs() -> None:
    result = latency._latency([5.0, 1.0, 2.0, 4.0, 3.0], "torch", 2)
    assert (result.median_ms, result.p10, result.p90, result.runs, result.threads) == (3.0, 1.4, 4.6, 5, 2)
    assert latency._latency([7.0], "torch", 1) == latency.Latency(7.0, 7.0, 7.0, 1, "torch", 1)


def test_runs_take_turns() -> None:
    order: list[str] = []
    runs = [lambda: order.append("A"), lambda: order.append("B")]
    times = latency.time_in_turns(runs, latency.Pace(turns=3, within=2), MadeUpClock())
    assert "".join(order) == "AABB" * 3 and [len(taken) for taken in times] == [3, 3]


def test_comparison_of_an_onnx_file_and_a_module(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "m.onnx"
    export_graph(build_graph(model(), {"input": INPUT}), path, "torchscript")
    inputs = {"input": INPUT, "unused": INPUT}
    result = compare_latency(
        {"dense": (path, INPUT), "again": (str(path), inputs), "net": (model(), INPUT)}, TRACED, **FAST
    )
    assert list(result.latencies) == list(result.ratios) == ["dense", "again", "net"]
    assert list(result.to_dict()) == ["latencies", "ratios", "intervals"] and result.ratios["dense"] == 1.0
    assert result.intervals["dense"] == (1.0, 1.0)
    assert all(low <= result.ratios[name] <= high for name, (low, high) in result.intervals.items())
    with pytest.raises(ModelError, match="do not fit .*m.onnx, whose inputs are input"):
        measure_latency(path, {"inpt": INPUT})
    with pytest.raises(ModelError, match=r"cannot run inputs of shape \{'input': \(2, 3, 9, 9\)\}"):
        measure_latency(path, torch.randn(2, 3, 9, 9))
    with pytest.raises(ModelError, match="use runtime='onnxruntime'"):
        measure_latency(path, INPUT, "torch")


class MadeUpClock:
    """Time that goes by only while something is run; each run takes the next of its milliseconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, milliseconds: Iterable[float]) -> Callable[[], None]:
        left = itertools.cycle(milliseconds)

        def run() -> None:
            self.now += next(left) / 1e3

        return run


def test_a_ratio_is_taken_turn_by_turn() -> None:
    """The machine slows down threefold half-way; both models do, and their ratio stays."""
    speed = [1.0] * 10 + [3.0] * 11
    ratio = latency.ratio_of(speed, [0.5 * one for one in speed])
    assert (ratio.value, ratio.low, ratio.high, ratio.turns) == (0.5, 0.5, 0.5, 21) and not ratio.is_noisy
    assert ratio.spread == pytest.approx((3.0 - 1.0) / 3.0)


@pytest.mark.parametrize("turns", [15, 40, 100])
def test_intervals_hold_the_truth_nineteen_times_in_twenty(turns: int) -> None:
    draw = random.Random(0)
    held = 0
    for _ in range(1000):
        dense, copy = ([draw.lognormvariate(0.0, 0.2) for _ in range(turns)] for _ in range(2))
        found = latency.ratio_of(dense, [0.4 * one for one in copy])
        held += found.low <= 0.4 <= found.high
    assert 0.94 <= held / 1000 <= 0.99


def test_a_neighbour_that_preempts_moves_no_ratio() -> None:
    """One run in four is interrupted for many times as long as it takes."""
    draw = random.Random(2)

    def preempted(ms: float) -> list[float]:
        return [
            ms * draw.uniform(1.0, 1.02) + (draw.uniform(1.0, 10.0) if draw.random() < 0.25 else 0) for _ in range(9973)
        ]

    for _ in range(20):
        clock = MadeUpClock()
        found = latency.ratio_in_turns(clock.run(preempted(1.0)), clock.run(preempted(0.29)), clock)
        assert found.value == pytest.approx(0.29, rel=0.01) and not found.is_noisy
        assert found.low == pytest.approx(0.29, rel=0.015) and found.high == pytest.approx(0.29, rel=0.015)


def test_the_first_run_after_another_model_does_not_count() -> None:
    clock = MadeUpClock()
    cold = [3.0, *[1.0] * 9]  # every turn has ten runs
    times = latency.time_in_turns([clock.run(cold), clock.run([0.2])], latency.Pace(6, 10), clock)
    assert times[0] == pytest.approx([1.0] * 6) and times[1] == pytest.approx([0.2] * 6)


@dataclasses.dataclass(frozen=True)
class ByMadeUpClock:
    """A runtime whose runs take made-up times: 4 ms of a module with a bias, else 1 ms; each fifth is preempted."""

    clock: MadeUpClock

    @contextlib.contextmanager
    def prepare(self, model: Any, example_inputs: Any, threads: int) -> Iterator[Callable[[], None]]:
        ms = 1.0 if model.bias is None else 4.0
        yield self.clock.run([ms] * 4 + [ms + 7.0])


def test_a_comparison_and_an_event_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = MadeUpClock()
    monkeypatch.setattr(latency, "clock_of", lambda *_: clock)
    monkeypatch.setattr(meter, "clock_of", lambda *_: clock)
    pair = {"dense": (nn.Linear(2, 2), INPUT), "pruned": (nn.Linear(2, 2, bias=False), INPUT)}
    found = compare_latency(pair, ByMadeUpClock(clock), repeats=20)  # type: ignore[arg-type]
    measured = meter.RuntimeMeter("torch")
    measured.runtime = ByMadeUpClock(clock)
    event, anchors = measured.ratio(pair["dense"], pair["pruned"]), measured.milliseconds(pair)
    assert (found.ratios["pruned"], event.value) == pytest.approx((0.25, 0.25))
    assert (*found.intervals["pruned"], event.low, event.high) == pytest.approx((0.25,) * 4)
    assert (found.latencies["dense"].median_ms, anchors["dense"]) == pytest.approx((4.0, 4.0))
    assert (found.latencies["dense"].runs, event.is_noisy) == (20, False)


@pytest.mark.parametrize(
    ("runtime", "threads", "expected"),
    [
        ("torch", 1, time.thread_time),
        ("torch_compile", 1, time.thread_time),
        ("onnxruntime", 1, time.thread_time),
        ("onnxruntime", 2, time.perf_counter),
        ("torch", 2, time.perf_counter),
        ({"type": "torch", "device": "cuda:0"}, 1, time.perf_counter),
        ("cuda", 1, time.perf_counter),
        ("tensorrt", 1, time.perf_counter),
    ],
)
def test_the_thread_counts_its_own_time_where_all_work_is_on_it(runtime: Any, threads: int, expected: Any) -> None:
    built = registry.build("runtime", runtime)
    assert latency.clock_of(built, threads, [model(), "file.onnx"]) is expected
    if runtime != "onnxruntime":
        assert latency.clock_of(built, threads, [nn.Linear(2, 2, device="meta")]) is time.perf_counter


def test_a_noisy_machine_is_measured_longer_and_said_to_be_noisy() -> None:
    clock = MadeUpClock()
    quiet = latency.ratio_in_turns(clock.run([20.0, 21.0]), clock.run([10.0, 10.5]), clock)
    assert not quiet.is_noisy and quiet.value == pytest.approx(0.5) and quiet.turns == 25
    draw = random.Random(1)
    wild = [10.0 * draw.uniform(0.5, 3.0) for _ in range(997)]
    noisy = latency.ratio_in_turns(clock.run([20.0]), clock.run(wild), clock)
    assert noisy.is_noisy and noisy.high - noisy.low > 0.06 * noisy.value
    assert noisy.turns > quiet.turns and noisy.turns % 3 == 0 and noisy.spread == pytest.approx(0.0)


def test_turns_are_as_many_as_time_allows() -> None:
    clock = MadeUpClock()
    paces = [latency.pace_of([clock.run([ms])], clock) for ms in (1.0, 6.0, 29.0, 900.0)]
    counted = [(one.turns, one.within) for one in paces]
    assert counted == [(latency.MOST, 10), (83, 3), (25, 2), (latency.FEWEST, 2)]
    both = latency.pace_of([clock.run([6.0]), clock.run([1.0])], clock)
    assert (both.turns, both.within) == (71, 3)  # the faster one runs as often in a turn


def test_the_least_of_a_layer_is_of_enough_runs() -> None:
    clock = MadeUpClock()
    assert latency.least_ms(clock.run([9.0, 3.0, 2.0, 1.0, 0.5]), clock) == pytest.approx(1.0)  # 3 + 2 + 1 are enough
    assert latency.least_ms(clock.run([0.1] * 15 + [0.01]), clock) == pytest.approx(0.01)


def test_what_models_are_compared_with() -> None:
    pair = {name: (model(), INPUT) for name in ("a", "b", "c", "d")}
    found = compare_latency(pair, "torch", **FAST, against={"b": "a", "d": "c", "c": "c"})
    assert found.ratios["a"] == found.ratios["c"] == 1.0
    assert found.intervals["c"] == (1.0, 1.0) and found.ratios["d"] > 0


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ConfigError, {"runtime": "onnxruntme"}, "runtime: 'onnxruntme' is not known; did you mean 'onnxruntime'"),
        (ConfigError, {"runtime": {"type": "torch", "compile": True}}, "compile"),
        (ConfigError, {"threads": 0}, "threads: 0"),
        (ConfigError, {"repeats": 0}, "repeats: 0"),
        (ConfigError, {"warmup": -1}, "warmup: -1"),
    ],
)
def test_bad_options(error: type[Exception], options: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        measure_latency(model(), INPUT, **options)


def test_bad_models(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no file"):
        measure_latency(tmp_path / "none.onnx", INPUT)
    with pytest.raises(ModelError, match="rejects inputs"):
        measure_latency(model(), torch.randn(2, 4, 8, 8), "torch")
    with pytest.raises(ConfigError, match="models: "):
        compare_latency({})


def test_a_runtime_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match="onnxruntime is needed here and not installed"):
        measure_latency(model(), INPUT)


def test_runtimes_are_registered() -> None:
    assert registry.names("runtime") == ["cuda", "onnxruntime", "tensorrt", "torch", "torch_compile"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_devices_and_packages_that_are_not_there_are_named() -> None:
    with pytest.raises(ConfigError, match="'cuda' needs a GPU .* Allowed: onnxruntime"):
        measure_latency(model(), INPUT, "cuda")
    with pytest.raises(ConfigError, match="'tensorrt' needs onnxruntime with TensorRT"):
        measure_latency(model(), INPUT, "tensorrt")


@pytest.mark.slow
def test_a_compiled_model_is_timed_compiled() -> None:
    net = model()
    result = measure_latency(net, INPUT, "torch_compile", **FAST)
    assert result.runtime == "torch_compile" and result.median_ms > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0 and isinstance(net, nn.Sequential)
