"""What is measured, exported, saved and run from the command line, on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from experiment_fixture import tiny
from gpu_training import EPOCHS, RULE, Loop, SmallNet, batch, check_reached, network, sgd
from torch import Tensor, nn
from typer.testing import CliRunner

from pruningawaretraining import Pruning, count_macs, export_onnx, load_pruned, measure_latency, save_pruned
from pruningawaretraining.cli.main import app
from pruningawaretraining.runtimes.timing import compare_latency


def pruned(device: torch.device) -> tuple[nn.Module, Pruning]:
    model = network(device)
    optimizer = sgd(model.parameters())
    pruner = Pruning(model, {"rules": [RULE]}, example_inputs=batch(device)[0][:1], optimizer=optimizer)
    Loop(model, pruner, optimizer).run(device, EPOCHS, steps=1)
    check_reached(pruner)
    return model.eval(), pruner


def test_a_pruned_model_is_saved_and_loaded(device: torch.device, tmp_path: Path) -> None:
    """Into a model on the same device, and into one on the CPU."""
    model, _ = pruned(device)
    images, _ = batch(device)
    save_pruned(model, tmp_path / "pruned.safetensors")
    for where in (device, torch.device("cpu")):
        loaded = load_pruned(network(device).to(where), tmp_path / "pruned.safetensors").eval()
        assert {parameter.device.type for parameter in loaded.parameters()} == {where.type}
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name].cpu(), value.cpu()), name
        assert count_macs(loaded, images[:1].to(where)) == count_macs(model, images[:1])


def test_a_model_on_the_gpu_is_exported(device: torch.device, tmp_path: Path) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    model, _ = pruned(device)
    images, _ = batch(device)
    with torch.no_grad():
        scale = float(model(images).abs().max())
    exported = export_onnx(model, images[:2], tmp_path / "model.onnx")
    assert exported.max_abs_diff <= 1e-3 * scale
    assert {parameter.device.type for parameter in model.parameters()} == {device.type}


@pytest.mark.parametrize("runtime", ["torch", "torch_compile", "cuda"])
def test_a_pruned_model_is_timed(device: torch.device, runtime: str) -> None:
    if runtime != "torch" and device.type != "cuda":
        pytest.skip("needs a CUDA device")
    model = SmallNet().to(device)
    images, _ = batch(device)
    found = measure_latency(model, images, runtime=runtime, repeats=10, warmup=3)
    assert (found.runtime, found.runs) == (runtime, 10)
    assert 0 < found.p10 <= found.median_ms <= found.p90
    assert {parameter.device.type for parameter in model.parameters()} == {device.type}


class Wide(nn.Module):
    """Three convolutions whose time goes with their widths when the batch is large."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.third, self.out = nn.Conv2d(width, width, 3, padding=1), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(x))))))
        found: Tensor = self.out(x.mean((2, 3)))
        return found


@pytest.mark.parametrize(
    ("runtime", "model_on"),
    [("cuda", "cpu"), ("torch_compile", "device"), ("torch", "device")],
    ids=["cuda, model on the CPU", "torch_compile", "torch"],
)
def test_a_latency_target(
    device: torch.device, runtime: str, model_on: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model may be on the CPU when its time on the GPU is what counts."""
    on_gpu = device.type == "cuda"
    if runtime != "torch" and not on_gpu:
        pytest.skip("needs a CUDA device")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = Wide(64 if on_gpu else 16).to("cpu" if model_on == "cpu" else device)
    where = next(model.parameters()).device
    images = torch.randn(1, 3, 32, 32, device=where) if on_gpu else torch.randn(1, 3, 12, 12)
    target = {"latency": 0.7, "runtime": runtime, "batch": 1024 if on_gpu else 32}
    pruner = Pruning(model, {"rules": [{"start": 0, "end": 1, "target": target}]}, example_inputs=images)
    dense = Wide(64 if on_gpu else 16).to(where)
    for epoch in range(3):
        pruner.prune(model, epoch)
    assert pruner.phase == "finetune"
    assert 0 < pruner.macs.fraction < 0.9
    assert {parameter.device for parameter in model.parameters()} == {where}
    if on_gpu:  # an idle GPU repeats its times closely
        large = images.repeat(1024, 1, 1, 1)
        ratio = compare_latency({"dense": (dense, large), "pruned": (model, large)}, runtime, repeats=20).ratios
        assert ratio["pruned"] < 0.85


# --- commands -------------------------------------------------------------------------------------------------------


def pat(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def summary_of(folder: Path, device: torch.device) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert summary["environment"]["device"].startswith(device.type)
    return summary


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_pat_run(device: torch.device, amp: str, tmp_path: Path) -> None:
    if device.type == "cpu" and amp == "fp16":
        pytest.skip("needs a CUDA device")
    for package in ("sklearn", "onnx", "onnxruntime"):
        pytest.importorskip(package)
    config = tiny(device=device.type, amp=amp, channels_last=amp != "none", epochs=4)
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(config))
    pat("run", tmp_path / "experiment.yaml", "--out", tmp_path / "out")
    summary = summary_of(tmp_path / "out", device)
    assert summary["pruned"]["macs"] <= 0.6 * summary["dense"]["macs"]


def test_pat_demo(cuda: torch.device, tmp_path: Path) -> None:
    """The whole demo, with its targets of MACs and of latency in onnxruntime: `make demo` is it on the CPU."""
    for package in ("sklearn", "onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    pat("demo", "--out", tmp_path / "demo")
    summary = summary_of(tmp_path / "demo", cuda)
    assert summary["pruned"]["macs"] <= 0.5 * summary["dense"]["macs"]
    assert summary["pruned"]["accuracy"] > 0.97
    assert (tmp_path / "demo" / "report.html").is_file()
