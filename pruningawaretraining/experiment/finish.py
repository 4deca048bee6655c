"""After training: save, load again, export, measure, compare, and write down what the run came to."""

from __future__ import annotations

import contextlib
import datetime
import logging
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pruningawaretraining.checkpoint.pruned import load_pruned, save_pruned
from pruningawaretraining.costs.macs import count_macs
from pruningawaretraining.experiment import record
from pruningawaretraining.experiment.build import build_model
from pruningawaretraining.experiment.data import DataSet, Pipeline
from pruningawaretraining.experiment.display import Display
from pruningawaretraining.experiment.family import family_latencies, family_rows, load_members, setting_of
from pruningawaretraining.experiment.schema import ExperimentConfig
from pruningawaretraining.experiment.verify import OnnxModel, accuracy_of, difference, scores
from pruningawaretraining.export.onnx import export_onnx
from pruningawaretraining.files import write_atomically
from pruningawaretraining.report.html import write_report
from pruningawaretraining.runtimes.runtime import on_device
from pruningawaretraining.runtimes.timing import LatencyComparison, compare_latency
from pruningawaretraining.session.pruning import Pruning
from pruningawaretraining.version import __version__

logger = logging.getLogger(__name__)
CPU = torch.device("cpu")
VERIFIED_IMAGES = 64
ONNX_TEST_MACS = 1e12  # above this, the ONNX file is not run over the whole test set


@dataclass(frozen=True)
class Trained:
    """Results of training.

    Attributes:
        config: the experiment.
        data, pipeline: its data set, and how images become inputs.
        device: where the model was trained.
        model, pruner: the pruned model, with its pruner.
        accuracy: of the pruned model on the test images.
        dense_accuracy: of the dense model, or None.
        dense_seconds, pruned_seconds: time spent on each, None for no baseline.
        masked_removed: the check made when channels were removed.
        before: wall-clock time until the last checkpoint, over all sessions.
        members: lines of a family's members, in order.
        recovery: what each part of it came to; None where none was asked for.
    """

    config: ExperimentConfig
    data: DataSet
    pipeline: Pipeline
    device: torch.device
    model: nn.Module
    pruner: Pruning
    accuracy: float
    dense_accuracy: float | None
    dense_seconds: float | None
    pruned_seconds: float
    masked_removed: float | None
    before: float
    members: list[dict[str, Any]]
    recovery: dict[str, Any] | None = None

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.config.folder()

    def fresh_model(self) -> nn.Module:
        """The dense model, newly built, on the CPU."""
        return build_model(self.config.model, len(self.data.classes), self.data.shape[0])

    def images(self, count: int) -> Tensor:
        """The first test images, normalised, on the CPU."""
        return next(self.pipeline.test(self.data.test, count, self.device))[0].cpu()


def finish(trained: Trained, display: Display) -> dict[str, Any]:
    """Write everything that a finished run leaves in its folder; see :mod:`record`.

    Returns:
        The content of ``summary.json``.
    """
    started, folder = time.perf_counter(), trained.folder
    pruning = trained.pruner.report().to_dict() if prunes(trained.pruner) else {}
    model = trained.model.to(CPU)
    save_pruned(model, folder / record.PRUNED)
    reloaded = load_pruned(trained.fresh_model(), folder / record.PRUNED)
    images = trained.images(VERIFIED_IMAGES)
    before, after = scores(model, images), scores(reloaded, images)
    verification: dict[str, float | None] = {
        "scale": float(before.abs().max()),
        "masked_removed": trained.masked_removed,
        "removed_reloaded": difference(before, after),
        "reloaded_onnx": None,
        "onnx_accuracy": None,
    }
    if trained.config.onnx is not None:
        with display.step("exporting to ONNX and checking it in onnxruntime"):
            verification.update(_exported(trained, reloaded, after, images))
    latency, members = None, load_members(trained.members, folder, trained.fresh_model)
    times: dict[str, Mapping[str, Any]] = {}
    if trained.config.latency is not None:
        with display.step("measuring latency, dense and pruned in turns"):
            latency = _latency(trained, reloaded)
            times = _family_latencies(trained, members) if members else {}
    summary = _summary(trained, reloaded, pruning, verification, latency)
    with display.step("exporting the family") if members else contextlib.nullcontext():
        summary["family"] = family_rows(trained.members, folder, members, times, trained.config.onnx, images)
    written = {one[key] for one in summary["family"] for key in ("file", "onnx") if one[key]}
    summary["files"] = sorted({*summary["files"], *written})
    summary["seconds"] = trained.before + time.perf_counter() - started
    record.write_json(folder / record.SUMMARY, summary, indent=2)
    write_report(folder)
    return summary


def prunes(pruner: Pruning) -> bool:
    """Whether the pruner's config does anything at all."""
    return not pruner.config.infer and any(rule.enabled for rule in pruner.config.rules)


def save_dense(model: nn.Module, folder: Path) -> None:
    """Write the dense weights, for comparison."""
    tensors = {key: value.detach().to(CPU, copy=True).contiguous() for key, value in model.state_dict().items()}
    write_atomically(folder / record.DENSE, lambda path: save_file(tensors, path))


def _exported(trained: Trained, model: nn.Module, expected: Tensor, images: Tensor) -> dict[str, float | None]:
    spec = trained.config.onnx
    assert spec is not None
    path = trained.folder / record.ONNX
    export_onnx(model, images[:2], path, exporter=spec.exporter, opset=spec.opset, tolerance=spec.tolerance)
    onnx = OnnxModel(path)
    found: dict[str, float | None] = {"reloaded_onnx": difference(expected, onnx(images))}
    if count_macs(model, images[:1]) * len(trained.data.test) <= ONNX_TEST_MACS:
        found["onnx_accuracy"] = accuracy_of(onnx, trained.pipeline.test(trained.data.test, 250, trained.device))
    return found


def _latency(trained: Trained, model: nn.Module) -> dict[str, Any]:
    """The latency of dense and pruned model for the report, in turns."""
    spec = trained.config.latency
    assert spec is not None
    setting = {"runtime": spec.runtime, "threads": spec.threads, "batch": spec.batch}
    found, rows = _timed(trained, {"pruned": model}, setting)
    common = {**setting, "batch": rows, "ratio": found.ratios["pruned"]}
    common["interval"] = list(found.intervals["pruned"])
    measured = {name: found.latencies[name].to_dict() for name in ("dense", "pruned")}
    return {**common, **measured, "events": _latency_events(trained.pruner)}


def _family_latencies(trained: Trained, members: Mapping[str, nn.Module]) -> dict[str, Mapping[str, Any]]:
    """The latency of a family's members where it was promised, in turns with the dense model."""
    setting = setting_of(trained.config)
    found, rows = _timed(trained, members, setting)
    return family_latencies(found, {**setting, "batch": rows}, members)


def _timed(
    trained: Trained, models: Mapping[str, nn.Module], setting: Mapping[str, Any]
) -> tuple[LatencyComparison, int]:
    """Time models in turns with the dense one, and say on how many images at once."""
    spec = trained.config.latency
    assert spec is not None
    images = trained.images(setting["batch"])
    runtime = on_device({"type": setting["runtime"]}, trained.device)
    if setting["runtime"] == "onnxruntime" and trained.config.onnx is not None:
        runtime["exporter"] = trained.config.onnx.exporter
    timed = {name: (one, images) for name, one in {"dense": trained.fresh_model(), **models}.items()}
    return compare_latency(timed, runtime, setting["threads"], spec.repeats, spec.warmup), len(images)


def _latency_events(pruner: Pruning) -> list[dict[str, Any]]:
    """Predicted and measured latencies at the events of latency targets."""
    if not any(rule.target.about_costs for rule in pruner.config.rules):
        return []
    return [{"rule": one.key, **event} for one in pruner.engine.rules for event in one.state.latencies]


def _summary(
    trained: Trained,
    model: nn.Module,
    pruning: dict[str, Any],
    verification: dict[str, float | None],
    latency: dict[str, Any] | None,
) -> dict[str, Any]:
    config, data, folder = trained.config, trained.data, trained.folder
    dense = {"accuracy": trained.dense_accuracy, **_costs(trained.fresh_model(), folder / record.DENSE, trained)}
    pruned = {"accuracy": trained.accuracy, **_costs(model, folder / record.PRUNED, trained)}
    for name, one, seconds in (("dense", dense, trained.dense_seconds), ("pruned", pruned, trained.pruned_seconds)):
        one.update(latency_ms=latency[name]["median_ms"] if latency else None, seconds=seconds)
    target = next((rule.target.members()[-1] for rule in config.pruning.rules if rule.enabled), None)
    written = [name for name in record.FILES if (folder / name).is_file() and name != record.CHECKPOINT]
    return {
        "format": 1,
        "name": config.name,
        "version": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": _environment(trained.device),
        "config": config.resolved(),
        "data": {
            "name": data.name,
            "classes": len(data.classes),
            "train": len(data.train),
            "test": len(data.test),
            "shape": list(data.shape),
        },
        "epochs": config.epochs if trained.recovery is None else trained.recovery["epochs"],
        "dense": dense,
        "pruned": pruned,
        "target": None if target is None else target.model_dump(mode="json"),
        "pruning": pruning,
        "recovery": trained.recovery,
        "verification": verification,
        "latency": latency,
        "files": sorted({*written, record.SUMMARY, record.REPORT, *record.NUMBERS}),
    }


def _costs(model: nn.Module, path: Path, trained: Trained) -> dict[str, Any]:
    return {
        "macs": count_macs(model, trained.images(1)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": path.stat().st_size,
    }


def _environment(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
    }
