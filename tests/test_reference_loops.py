"""The loops of timm's and torchvision's training scripts, with the lines of docs/integrations.md."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_loops import CHECKPOINTS, EPOCHS, EXAMPLE, RUNS, build, ended

from pruningawaretraining import export_onnx, load_pruned
from pruningawaretraining.checkpoint.records import PRUNER_KEY

SCRIPT = Path(__file__).parent / "reference_loops.py"
REMOVED = 3
"""The epoch after which channels go."""
KINDS = list(RUNS)


WHOLE, BEFORE, AFTER = "whole", "before", "after"
STARTS = {WHOLE: None, BEFORE: REMOVED - 1, AFTER: REMOVED}
"""Trainings: the uninterrupted one, and those that go on from the checkpoint of an epoch."""
Found = dict[str, Any]


def kinds() -> list[str]:
    """The scripts whose package is here."""
    return [kind for kind in KINDS if kind != "timm" or importlib.util.find_spec("timm") is not None]


def checkpoint(folder: Path, kind: str, start: str) -> Path | None:
    epoch = STARTS[start]
    return None if epoch is None else folder / f"{kind}-whole" / CHECKPOINTS[kind].format(epoch)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], list[Found]]]:
    """Every training in this process."""
    folder = tmp_path_factory.mktemp("alone")
    every = [(kind, start) for start in STARTS for kind in kinds()]
    return folder, {
        (kind, start): [ended(kind, folder / f"{kind}-{start}", checkpoint(folder, kind, start))]
        for kind, start in every
    }


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], list[Found]]]:
    """Every training in two processes: those that go on in new ones, with the first wrapper made before any pruner."""
    folder = tmp_path_factory.mktemp("together")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    found = {}
    for starts in ((WHOLE,), (AFTER, BEFORE)):
        every = [(kind, start) for start in starts for kind in reversed(kinds())]
        jobs = [
            (kind, str(folder / f"{kind}-{start}"), str(checkpoint(folder, kind, start) or "-"))
            for kind, start in every
        ]
        command = [sys.executable, *launcher, str(SCRIPT), *itertools.chain.from_iterable(jobs)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        for kind, start in every:
            paths = [folder / f"{kind}-{start}" / f"rank{number}.pt" for number in (0, 1)]
            found[kind, start] = [torch.load(path, weights_only=True) for path in paths]
    return folder, found


@pytest.fixture(params=["alone", "together"])
def trained(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    if request.param not in kinds():
        pytest.skip(f"{request.param} is not installed")
    return str(request.param)


def weights(path: Path, average: bool = False) -> dict[str, torch.Tensor]:
    """The weights in a script's checkpoint, without the pruner's state."""
    checkpoint = torch.load(path, weights_only=True)
    names = ("state_dict_ema", "model_ema") if average else ("state_dict", "model")
    found = next(checkpoint[name] for name in names if name in checkpoint)
    return {name: value for name, value in found.items() if PRUNER_KEY not in name}


def size(state: dict[str, torch.Tensor]) -> int:
    return sum(value.numel() for value in state.values() if value.dim() > 0)


def test_the_lines_prune_and_checkpoints_and_average_follow(kind: str, trained: Any) -> None:
    folder, found = trained
    one = found[kind, WHOLE][0]
    assert one["phase"] == "finetune" and one["macs"] <= 0.6
    shapes = {name: value.shape for name, value in one["model"].items()}
    assert {name: value.shape for name, value in one["average"].items()} == shapes
    paths = [folder / f"{kind}-whole" / CHECKPOINTS[kind].format(epoch) for epoch in range(EPOCHS)]
    for average in (False, True):
        sizes = [size(weights(path, average)) for path in paths]
        assert sizes[0] == sizes[REMOVED - 1] > sizes[REMOVED] == sizes[-1] == size(one["model"])


def test_the_average_goes_on_after_the_removal(kind: str, alone: Any) -> None:
    """None of its tensors stays as it was."""
    paths = [alone[0] / f"{kind}-whole" / CHECKPOINTS[kind].format(epoch) for epoch in (REMOVED, EPOCHS - 1)]
    before, after = (weights(path, True) for path in paths)
    assert [name for name, value in after.items() if value.dim() > 0 and torch.equal(value, before[name])] == []


def test_timms_best_checkpoint_is_pruned(trained: Any) -> None:
    pytest.importorskip("timm")
    folder, found = trained
    path = folder / "timm-whole" / "model_best.pth.tar"
    assert torch.load(path, weights_only=True)["epoch"] == REMOVED
    assert size(weights(path)) == size(found["timm", WHOLE][0]["model"])


@pytest.mark.parametrize("start", [BEFORE, AFTER])
def test_resumed_equals_uninterrupted(kind: str, start: str, trained: Any) -> None:
    """From the checkpoint before the removal, and from the one after it: model and average."""
    straight, again = (trained[1][kind, one][0] for one in (WHOLE, start))
    for part in ("model", "average"):
        assert straight[part].keys() == again[part].keys()
        for name, value in straight[part].items():
            torch.testing.assert_close(again[part][name], value, rtol=0, atol=1e-6, msg=f"{part} {name}")


@pytest.mark.parametrize("start", STARTS)
def test_two_processes_stay_the_same_after_the_wrapper_was_made_anew(kind: str, start: str, together: Any) -> None:
    first, second = together[1][kind, start]
    assert first["phase"] == second["phase"] == "finetune" and first["macs"] <= 0.6
    for name, value in first["model"].items():
        if "running" not in name:  # statistics are of each process's own images
            assert torch.equal(value, second["model"][name]), name


def test_the_pruned_model_is_saved(kind: str, trained: Any) -> None:
    folder, found = trained
    loaded = load_pruned(build(), folder / f"{kind}-whole" / "pruned.safetensors")
    for name, value in found[kind, WHOLE][0]["model"].items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_what_was_saved_is_exported(kind: str, alone: Any, tmp_path: Path) -> None:
    loaded = load_pruned(build(), alone[0] / f"{kind}-whole" / "pruned.safetensors")
    export_onnx(loaded, EXAMPLE, tmp_path / "pruned.onnx", exporter="torchscript")  # compares the file with the model
