"""`pat run` under torchrun: it ends as on one process, and after a process was killed it goes on with fewer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from experiment_fixture import tiny
from ranks_models import PlainNet
from typer.testing import CliRunner

from pruningawaretraining import load_pruned
from pruningawaretraining.cli.main import app
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.experiment import checks
from pruningawaretraining.experiment.state import load_state

TESTS = Path(__file__).parent
CONFIG = tiny(
    model={"name": "ranks_models:PlainNet", "kwargs": {}},
    optimizer={"name": "SGD", "lr": 0.02, "kwargs": {"momentum": 0.9}},
    data={"flip": True},
    dense_baseline=False,
    epochs=5,
    latency=None,
    onnx=None,
)


def alone(folder: Path, out: str, *arguments: str) -> str:
    """A run in this process; what it said."""
    done = CliRunner().invoke(app, ["run", str(folder / "e.yaml"), "--out", str(folder / out), *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def under_torchrun(folder: Path, out: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A run under torchrun."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *several, "-m", "pruningawaretraining", "run", str(folder / "e.yaml"), "--out", out]
    paths = f"{TESTS.parent}{os.pathsep}{TESTS}"
    known = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment}
    return subprocess.run(command, env=known, capture_output=True, text=True, timeout=300, cwd=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "e.yaml").write_text(yaml.safe_dump(CONFIG))
    alone(folder, "one")
    return folder


def weights(path: Path) -> dict[str, Any]:
    return load_pruned(PlainNet(), path / "pruned.safetensors").state_dict()


def check_same(mine: Path, theirs: Path) -> None:
    one, other = weights(mine), weights(theirs)
    assert any(one[name].shape != value.shape for name, value in PlainNet().state_dict().items()), "nothing was removed"
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=1e-5)


def test_two_processes_run_as_one(folder):
    done = under_torchrun(folder, "two")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("epoch   4/4") == 1, "one process speaks"
    check_same(folder / "one", folder / "two")
    names = [sorted(path.name for path in (folder / one).iterdir()) for one in ("one", "two")]
    assert names[0] == names[1]
    rows = [[yaml.safe_load(line) for line in (folder / one / "metrics.jsonl").open()] for one in ("one", "two")]
    for one, two in zip(*rows, strict=True):
        assert {key: one[key] for key in ("phase", "accuracy", "macs")} == {
            key: two[key] for key in ("phase", "accuracy", "macs")
        }
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)


@pytest.mark.parametrize(
    "passes", [8, pytest.param(17, marks=pytest.mark.slow)]
)  # five steps an epoch: while channels are masked, and after they have gone
def test_a_run_whose_process_was_killed_goes_on_with_one(folder, passes):
    died = under_torchrun(folder, f"died{passes}", DIE_AT=str(passes))
    assert died.returncode != 0 and "SIGKILL" in died.stderr
    assert not (folder / f"died{passes}" / "summary.json").exists()
    state = load_state(
        folder / f"died{passes}", {**yaml.safe_load((folder / f"died{passes}" / "config.yaml").read_text())}
    )
    assert state.epoch == (passes - 1) // 5
    assert f"epoch {state.epoch}" in alone(folder, f"died{passes}", "--resume")
    check_same(folder / "one", folder / f"died{passes}")


def test_batches_that_cannot_be_shared_are_refused(monkeypatch):
    monkeypatch.setattr(checks, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="batch_size: 63 images cannot be shared by 2 processes"):
        checks.check_share(63)


def test_a_recovery_ends_as_on_one_process(tmp_path):
    """The teacher is read by every process once the first has written it; averages and added epochs are the same."""
    recovery = {
        "rate": {"warmup": 0.5},
        "average": {"decay": 0.8, "last": 0.5},
        "distillation": {"weight": 0.5},
        "budget": "macs",
    }
    pruning = {"rules": [{"start": 1, "target": {"macs": 0.6}}], "recovery": recovery}
    config = {**CONFIG, "pruning": pruning, "dense_baseline": True, "epochs": 4}
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(config))
    alone(tmp_path, "1")
    done = under_torchrun(tmp_path, "2")
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads((tmp_path / out / "summary.json").read_text())["recovery"] for out in ("1", "2")]
    check_same(tmp_path / "1", tmp_path / "2")
    assert found[0]["began"] == 2 and found[0]["epochs"] > 4
    assert found[0] == found[1]
