"""Everything that copies a model, makes tensors or is given inputs works where the model is; see second_device.py."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from experiment_fixture import tiny
from safetensors.torch import load_file, save_file
from second_device import THERE, Elsewhere, on_the_cpu, second_device
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pruningawaretraining import Pruning, count_macs, export_onnx, load_pruned, one_shot, save_pruned
from pruningawaretraining.analysis.sensitivity import SensitivityOptions, measure
from pruningawaretraining.costs.latency.layer_shapes import layer_shapes
from pruningawaretraining.costs.latency.meter import RuntimeMeter
from pruningawaretraining.costs.memory import peak_activation_bytes
from pruningawaretraining.experiment import record
from pruningawaretraining.experiment.models import DigitsResNet
from pruningawaretraining.experiment.one_shot_run import OneShotOptions, run_one_shot
from pruningawaretraining.experiment.run import run_experiment
from pruningawaretraining.experiment.runner import Runner
from pruningawaretraining.experiment.schema import load_experiment
from pruningawaretraining.experiment.shipped import find_config
from pruningawaretraining.export import onnx as export
from pruningawaretraining.masks.pruned_copy import bare_copy
from pruningawaretraining.models.calling import beside, move
from pruningawaretraining.runtimes import exporters, timing
from pruningawaretraining.runtimes.timing import measure_latency

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
WIDTHS = {"widths": [8, 16], "blocks": 1}


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The second device; exporters run as without it, and latency is measured in few runs."""
    monkeypatch.setattr(exporters, "export_graph", on_the_cpu(exporters.export_graph))
    monkeypatch.setattr(export, "export_graph", exporters.export_graph)
    for name, value in (("SPENT_MS", 1.0), ("LEAST_RUNS", 1), ("MOST_RUNS", 1), ("LAYER_MS", 0.0)):
        monkeypatch.setattr(timing, name, value)
    with second_device() as device:
        yield device


def net(device: Any = "lazy") -> DigitsResNet:
    torch.manual_seed(0)
    return DigitsResNet(**WIDTHS).to(device)


def small(device: Any) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 10)).to(device)


def is_there(model: nn.Module) -> bool:
    return all(isinstance(one, Elsewhere) for one in (*model.parameters(), *model.buffers()))


def test_the_second_device_is_one(there: torch.device) -> None:
    """Numbers are those of the CPU, and an operation on tensors of both devices raises."""
    model, twin = net(), net("cpu")
    with torch.no_grad():
        assert torch.equal(model.eval()(IMAGES.to(there)).cpu(), twin.eval()(IMAGES))
    model(IMAGES.to(there)).sum().backward()
    assert model.conv1.weight.grad is not None and model.conv1.weight.grad.device == THERE
    with pytest.raises(RuntimeError, match="two devices"):
        model(IMAGES)
    with pytest.raises(RuntimeError, match="two devices"):
        model.conv1.weight * torch.ones(8, 1, 1, 1)


def test_the_demo_ends_there(there: torch.device, tmp_path: Path) -> None:
    """`pat demo` with a smaller network and fewer epochs: trained, measured at events, removed, exported, timed."""
    config = yaml.safe_load(find_config("demo").read_text(encoding="utf-8"))
    config["model"] = {"name": "pruningawaretraining.experiment.models:DigitsResNet", "kwargs": WIDTHS}
    config["data"]["train_fraction"] = 0.1
    rule = config["pruning"]["rules"][0]
    rule.update(start=1, end=1, multiple=1, target={**rule["target"], "macs": 0.7, "latency": 1.0})
    config.update(
        epochs=3,
        onnx={"exporter": "torchscript"},
        device="lazy",
        out=str(tmp_path),
        latency={"batch": 16, "repeats": 3, "warmup": 1},
    )
    summary = run_experiment(load_experiment(config))
    assert summary["pruned"]["macs"] <= 0.7 * summary["dense"]["macs"]
    assert summary["latency"]["events"][-1]["measured_ms"] > 0
    assert summary["environment"]["device"].startswith("lazy")
    checks = summary["verification"]
    assert max(checks["masked_removed"], checks["removed_reloaded"], checks["reloaded_onnx"]) < 1e-5


def test_a_run_there_is_resumed(there: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the checkpoint holds goes back to the device; the run ends as one on the CPU does."""
    config = tiny(data={"train_fraction": 0.1}, epochs=3, dense_baseline=False, onnx=None, latency=None)
    config.update(device="lazy", out=str(tmp_path / "there"))
    whole = Runner._save

    def save(self: Runner, stage: Any) -> None:
        whole(self, stage)
        if stage is not None and self.state.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "_save", save)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(load_experiment(config))
    monkeypatch.setattr(Runner, "_save", whole)
    run_experiment(load_experiment(config), resume=True)
    run_experiment(load_experiment({**config, "device": "cpu", "out": str(tmp_path / "cpu")}))
    ended, expected = (load_file(tmp_path / name / record.PRUNED) for name in ("there", "cpu"))
    assert all(torch.allclose(ended[key], value, atol=1e-4) for key, value in expected.items())


@pytest.mark.parametrize("target", [{"latency": 1.0, "runtime": "torch", "macs": 0.7}, {"peak_memory": 0.7}], ids=str)
def test_targets_are_measured_there(there: torch.device, target: dict[str, Any]) -> None:
    """Copies of the model and the inputs meet, whichever of them the user has put there."""
    rule = {"pattern": "channel", "target": target}
    for inputs in (IMAGES, IMAGES.to(there)):
        pruner = Pruning(net(), {"rules": [rule]}, example_inputs=inputs)
        pruner.prune(epoch=0)
        assert is_there(pruner.model) and float((~pruner.channel_pruner.keep_D).sum()) > 0
    if "latency" in target:
        (made,) = pruner.channel_pruner.targets._latencies.values()
        assert made.meter.runtime.device == "lazy:0"


def test_runtimes_take_the_model_and_its_inputs_along(there: torch.device) -> None:
    model, traced = net("cpu"), {"type": "onnxruntime", "exporter": "torchscript"}
    for given, runtime in ((net(), "torch"), (model, {"type": "torch", "device": "lazy"}), (net(), traced)):
        assert measure_latency(given, IMAGES, runtime, repeats=2, warmup=1).median_ms > 0
    assert not any(isinstance(one, Elsewhere) for one in model.parameters())


@pytest.mark.parametrize(
    ("runtime", "device", "expected"),
    [
        ("torch", "cuda:1", {"type": "torch", "device": "cuda:1"}),
        ("compile", "cuda:0", {"type": "compile", "device": "cuda:0"}),
        ({"type": "torch", "device": "cpu"}, "cuda:0", {"type": "torch", "device": "cpu"}),
        ("torch", "cpu", {"type": "torch"}),
        ("torch", None, {"type": "torch"}),
        ("onnxruntime", "cuda:0", {"type": "onnxruntime"}),
    ],
)
def test_a_meter_times_where_the_model_is(runtime: Any, device: str | None, expected: dict[str, Any]) -> None:
    """Times of PyTorch are of the model's own device, by the clock and not by the processor's time, and kept apart."""
    made = RuntimeMeter(runtime, device=None if device is None else torch.device(device))
    assert made._spec == expected
    elsewhere = expected.get("device", "cpu") != "cpu"
    assert made.clock is (time.perf_counter if elsewhere else time.thread_time)
    assert made.cache.where.get("device") == (expected["device"] if elsewhere else None)


def test_layers_are_read_where_the_copy_is(there: torch.device) -> None:
    model = net()
    copied = bare_copy(model)
    assert is_there(copied) and not any(isinstance(one, Elsewhere) for one in bare_copy(model, "cpu").parameters())
    for one in (model, copied, bare_copy(model, "cpu")):
        for inputs in (IMAGES, IMAGES.to(there)):
            assert layer_shapes(one, inputs, ["conv1"])["conv1"].outputs == 8
            assert count_macs(one, inputs) == count_macs(net("cpu"), IMAGES)
            assert peak_activation_bytes(one, inputs) == peak_activation_bytes(net("cpu"), IMAGES)


def test_a_pruned_model_is_saved_loaded_and_exported_from_there(there: torch.device, tmp_path: Path) -> None:
    model = net()
    pruner = Pruning(model, {"rules": [{"target": {"sparsity": 0.5}}]}, example_inputs=IMAGES)
    pruner.prune(epoch=0)
    pruner.remove()
    save_pruned(model, tmp_path / "pruned.safetensors")
    loaded = load_pruned(net(), tmp_path / "pruned.safetensors").eval()
    expected = model.eval()(IMAGES.to(there)).detach().cpu()
    assert is_there(loaded) and torch.allclose(loaded(IMAGES.to(there)).detach().cpu(), expected, atol=1e-6)
    assert export_onnx(loaded, IMAGES.to(there), tmp_path / "m.onnx", exporter="torchscript").relative_diff < 1e-4
    assert is_there(loaded)


@pytest.mark.parametrize(
    ("pattern", "criterion"),
    [("channel", "magnitude"), ("channel", "taylor"), ("unstructured", "magnitude"), ("2:4", "sparse_gpt")],
)
def test_one_shot_there(there: torch.device, pattern: str, criterion: str) -> None:
    """The same weights go as on the CPU, and stay with the same values."""
    data = [(IMAGES, torch.arange(8))]  # on the CPU
    rule = {"pattern": pattern, "criterion": criterion}
    found = {}
    for device in ("cpu", "lazy"):
        (found[device],) = one_shot(small(device).eval(), rule, data, cross_entropy, [0.5]).values()
    assert is_there(found["lazy"])
    for expected, one in zip(found["cpu"].parameters(), found["lazy"].parameters(), strict=True):
        assert one.shape == expected.shape
        assert torch.allclose(one.cpu(), expected, atol=1e-5)


def test_commands_on_trained_weights_run_there(there: torch.device, tmp_path: Path) -> None:
    weights = tmp_path / "dense.safetensors"
    save_file(net("cpu").state_dict(), weights)
    config = tiny(device="lazy", out=str(tmp_path / "out"))
    config["model"]["weights"] = str(weights)
    found = measure(load_experiment(config), SensitivityOptions((0.5,), 0.05, 60))
    assert all(0 <= row["accuracy"] <= 1 for one in found["sets"].values() for row in one["rows"])
    rows = run_one_shot(load_experiment(config), OneShotOptions(sparsities=(0.5,)))
    assert rows[1]["parameters"] < rows[0]["parameters"]


class Pair(NamedTuple):
    """Inputs with names."""

    images: Tensor
    count: int


def test_inputs_of_every_form_go_to_the_model(there: torch.device) -> None:
    model = net()
    assert beside(model, IMAGES).device == THERE
    pair = beside(model, Pair(IMAGES, 3))
    assert isinstance(pair, Pair) and pair.images.device == THERE and pair.count == 3
    assert beside(model, {"x": [IMAGES]})["x"][0].device == THERE
    inputs = IMAGES.to(there)
    assert beside(model, inputs) is inputs, "what is there already is not copied"
    spread = copy.deepcopy(model)
    spread.linear.cpu()
    assert beside(spread, IMAGES) is IMAGES, "a model on several devices says itself where its inputs go"
    assert beside(nn.ReLU(), IMAGES) is IMAGES
    assert move(IMAGES, THERE).device == THERE
