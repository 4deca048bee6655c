"""The callbacks inside Lightning, transformers' Trainer and Accelerate: averages, equal ends, processes, export."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import EPOCHS, IMAGE, REMOVED, TRAINERS, Ended, Net

from pruningawaretraining import export_onnx, load_pruned, save_pruned

SCRIPT = Path(__file__).parent / "trainers.py"


@pytest.fixture(params=list(TRAINERS))
def trainer(request: pytest.FixtureRequest) -> str:
    """The name of a trainer whose package is here."""
    return str(request.param)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that gives the uninterrupted training and its folder; each runs once."""
    known: dict[str, tuple[Ended, Path]] = {}

    def of(name: str) -> tuple[Ended, Path]:
        pytest.importorskip(name)
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            known[name] = TRAINERS[name](folder), folder
        return known[name]

    return of


def test_it_prunes_and_the_average_follows(trainer: str, whole: Any) -> None:
    ended, _ = whole(trainer)
    assert ended.pruner.channel_pruner.removed and ended.model.layers[0].out_channels == 4
    states = ended.states()
    assert states["model"].keys() == states["average"].keys() and ended.pruner.steps == 4 * EPOCHS
    for name, value in states["model"].items():
        if value.is_floating_point():  # half of the way in every step: the average is near the model, and not frozen
            torch.testing.assert_close(states["average"][name], value, rtol=0.1, atol=0.05, msg=name)


@pytest.mark.parametrize("epoch", [REMOVED - 1, REMOVED], ids=["before", "after"])
def test_resumed_equals_uninterrupted(trainer: str, epoch: int, whole: Any) -> None:
    """From a checkpoint of the trainer alone, before the removal and after it."""
    ended, folder = whole(trainer)
    again = TRAINERS[trainer](folder, epoch)
    assert again.pruner.steps == ended.pruner.steps
    assert all(torch.equal(keep, again.pruner.masks[name]) for name, keep in ended.pruner.masks.items())
    for part, state in ended.states().items():
        if part == "average" and trainer == "transformers":
            continue  # its checkpoints hold none
        for name, value in state.items():
            torch.testing.assert_close(again.states()[part][name], value, rtol=0, atol=1e-6, msg=f"{part} {name}")


def test_the_pruned_model_is_saved_and_exported(trainer: str, whole: Any, tmp_path: Path) -> None:
    ended, _ = whole(trainer)
    loaded = load_pruned(Net(), save_pruned(ended.model, tmp_path / "pruned.safetensors"))
    assert loaded.layers[0].out_channels == 4
    export_onnx(
        ended.model, IMAGE, tmp_path / "pruned.onnx", exporter="torchscript"
    )  # compares the file with the model


def test_two_processes_have_the_wrapper_made_anew(tmp_path: Path) -> None:
    """Both have the same weights after two epochs with fewer channels, and after going on from the removal."""
    if any(importlib.util.find_spec(name) is None for name in TRAINERS):
        pytest.skip("a trainer is not installed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in TRAINERS:
        for start in ("whole", "after"):
            paths = [tmp_path / f"{name}-{start}-{number}.pt" for number in (0, 1)]
            first, second = (torch.load(path, weights_only=True)["model"] for path in paths)
            assert first["layers.0.weight"].shape[0] == 4, name
            for key, value in first.items():
                if "running" not in key:  # statistics are of each process's own images
                    assert torch.equal(value, second[key]), f"{name} {start} {key}"
