"""The family of a run: each member's file when it is finished; its exports, costs and latency at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pruningawaretraining.checkpoint.pruned import load_pruned
from pruningawaretraining.costs.macs import count_macs
from pruningawaretraining.experiment.verify import OnnxModel, difference, scores
from pruningawaretraining.export.onnx import export_onnx
from pruningawaretraining.models.calling import evaluating
from pruningawaretraining.session.members import Member

if TYPE_CHECKING:
    from pruningawaretraining.experiment.finish import Trained
    from pruningawaretraining.experiment.runner import Runner
    from pruningawaretraining.experiment.train import Learner


def keep_member(runner: Runner, learner: Learner, member: Member) -> None:
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


def load_members(trained: Trained) -> dict[str, nn.Module]:
    """The members of a run by name, loaded from their files."""
    return {one["name"]: load_pruned(trained.fresh_model(), trained.folder / one["file"]) for one in trained.members}


def family_rows(
    trained: Trained, models: Mapping[str, nn.Module], latencies: Mapping[str, Any], images: Tensor
) -> list[dict[str, Any]]:
    """The lines of the report: what each member reached and costs, its files, and how far its ONNX file is from it.

    Args:
        trained: the run.
        models: its members, by name.
        latencies: median milliseconds by name, as measured in turns with the dense model; empty if not measured.
        images: for the comparison.
    """
    return [
        {
            **row,
            "macs": count_macs(models[row["name"]], images[:1]),
            "parameters": sum(parameter.numel() for parameter in models[row["name"]].parameters()),
            "bytes": (trained.folder / row["file"]).stat().st_size,
            "latency_ms": latencies.get(row["name"]),
            **_exported(trained, row, models[row["name"]], images),
        }
        for row in trained.members
    ]


def _exported(trained: Trained, row: Mapping[str, Any], model: nn.Module, images: Tensor) -> dict[str, Any]:
    """The member's ONNX file, and the largest difference of its outputs; None for both without one."""
    spec = trained.config.onnx
    if spec is None:
        return {"onnx": None, "onnx_difference": None}
    path = trained.folder / f"model-{row['name']}.onnx"
    export_onnx(model, images[:2], path, exporter=spec.exporter, opset=spec.opset, tolerance=spec.tolerance)
    return {"onnx": path.name, "onnx_difference": difference(scores(model, images), OnnxModel(path)(images))}
