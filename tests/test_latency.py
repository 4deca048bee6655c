"""Latency: structure, order of the runs and messages; how fast this machine is, is not tested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pruningawaretraining import registry
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
    times = latency.time_in_turns(runs, repeats=3, warmup=1)
    assert "".join(order) == "ABABABAB" and [len(taken) for taken in times] == [3, 3]


def test_comparison_of_an_onnx_file_and_a_module(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "m.onnx"
    export_graph(build_graph(model(), {"input": INPUT}), path, "torchscript")
    inputs = {"input": INPUT, "unused": INPUT}
    result = compare_latency(
        {"dense": (path, INPUT), "again": (str(path), inputs), "net": (model(), INPUT)}, TRACED, **FAST
    )
    medians = {name: one.median_ms for name, one in result.latencies.items()}
    assert result.ratios == {name: median / medians["dense"] for name, median in medians.items()}
    assert list(result.to_dict()) == ["latencies", "ratios"] and result.ratios["dense"] == 1.0
    with pytest.raises(ModelError, match="do not fit .*m.onnx, whose inputs are input"):
        measure_latency(path, {"inpt": INPUT})
    with pytest.raises(ModelError, match=r"cannot run inputs of shape \{'input': \(2, 3, 9, 9\)\}"):
        measure_latency(path, torch.randn(2, 3, 9, 9))
    with pytest.raises(ModelError, match="use runtime='onnxruntime'"):
        measure_latency(path, INPUT, "torch")


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
