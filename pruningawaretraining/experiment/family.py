"""The family of a run: each member's file when it is finished; its exports, costs and latency at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from pruningawaretraining.checkpoint.pruned import load_pruned
from pruningawaretraining.costs.macs import count_macs
from pruningawaretraining.experiment.schema import ExperimentConfig, OnnxConfig
from pruningawaretraining.experiment.state import RunState
from pruningawaretraining.experiment.train import Learner
from pruningawaretraining.experiment.verify import OnnxModel, difference, scores
from pruningawaretraining.export.onnx import export_onnx
from pruningawaretraining.models.calling import evaluating
from pruningawaretraining.registry import canonical
from pruningawaretraining.runtimes.timing import LatencyComparison
from pruningawaretraining.session.members import Member

Row = Mapping[str, Any]


class Keeping(Protocol):
    """A runner, as far as it has to be known to keep a member."""

    config: ExperimentConfig
    folder: Path
    state: RunState

    @property
    def writes(self) -> bool: ...

    def accuracy(self, learner: Learner) -> float: ...


def keep_member(runner: Keeping, learner: Learner, member: Member) -> None:
    """A member is finished: test it, write its file, and remember its line for the report.

    Args:
        runner: of the run.
        learner: trains the model; its modes are as before.
        member: it.
    """
    with evaluating(learner.model):
        accuracy = runner.accuracy(learner)
    if runner.writes:
        member.save(runner.folder)
    row = {
        "number": member.number,
        "name": member.name,
        "target": dict(member.target),
        "epoch": min(runner.state.epoch, runner.config.epochs - 1),
        "accuracy": accuracy,
        "file": member.file,
    }
    runner.state.members = [*(one for one in runner.state.members if one["number"] < member.number), row]


def load_members(rows: Iterable[Row], folder: Path, fresh_model: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    """The members of a run by name, loaded from their files into dense models."""
    return {one["name"]: load_pruned(fresh_model(), folder / one["file"]) for one in rows}


def family_rows(
    rows: Iterable[Row],
    folder: Path,
    models: Mapping[str, nn.Module],
    latencies: Mapping[str, Row],
    spec: OnnxConfig | None,
    images: Tensor,
) -> list[dict[str, Any]]:
    """The lines of the report: what each member reached and costs, its files, and how far its ONNX file is from it.

    Args:
        rows: what the run remembers of its members.
        folder: of the run.
        models: its members, by name.
        latencies: by name what :func:`family_latencies` gives; empty if not measured.
        spec: how members are exported; None: they are not.
        images: for the comparison.
    """
    return [
        {
            **row,
            "macs": count_macs(models[row["name"]], images[:1]),
            "parameters": sum(parameter.numel() for parameter in models[row["name"]].parameters()),
            "bytes": (folder / row["file"]).stat().st_size,
            **latencies.get(row["name"], {"latency_ms": None}),
            **_exported(folder, row["name"], models[row["name"]], spec, images),
        }
        for row in rows
    ]


def setting_of(config: ExperimentConfig) -> dict[str, Any]:
    """Where the latency of a family's members is measured: where it was promised; else as the run measures latency."""
    spec = config.latency
    found = {"runtime": spec.runtime, "batch": spec.batch, "threads": spec.threads} if spec is not None else {}
    for rule in config.pruning.rules:
        target = rule.target
        if rule.enabled and (target.latency is not None or target.latency_ms is not None):
            batch = found.get("batch") if target.batch is None else target.batch
            return {"runtime": canonical("runtime", target.runtime), "batch": batch, "threads": target.threads}
    return found


def family_latencies(found: LatencyComparison, setting: Row, names: Iterable[str]) -> dict[str, Row]:
    """Latency entries for the lines of a family's members.

    Args:
        found: their times, measured in turns with "dense".
        setting: see :func:`setting_of`.
        names: of the members.
    """
    return {
        name: {
            "latency_ms": found.latencies[name].median_ms,
            "dense_latency_ms": found.latencies["dense"].median_ms,
            "ratio": found.ratios[name],
            "interval": list(found.intervals[name]),
            "measured_on": dict(setting),
        }
        for name in names
    }


def _exported(folder: Path, name: str, model: nn.Module, spec: OnnxConfig | None, images: Tensor) -> dict[str, Any]:
    """The member's ONNX file, and the largest difference of its outputs; None for both without one."""
    if spec is None:
        return {"onnx": None, "onnx_difference": None}
    path = folder / f"model-{name}.onnx"
    export_onnx(model, images[:2], path, exporter=spec.exporter, opset=spec.opset, tolerance=spec.tolerance)
    return {"onnx": path.name, "onnx_difference": difference(scores(model, images), OnnxModel(path)(images))}
