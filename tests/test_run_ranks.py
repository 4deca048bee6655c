"""`pat run` under torchrun: it ends as on one process, and after a process was killed it goes on with fewer."""

from __future__ import annotations

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

from pruningawaretraining import load_pruned
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


def pat(folder: Path, ranks: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    several = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *several, "pruningawaretraining", "run", str(folder / "e.yaml"), *arguments]
    paths = f"{TESTS.parent}{os.pathsep}{TESTS}"
    known = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment}
    return subprocess.run(command, env=known, capture_output=True, text=True, timeout=300, cwd=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "e.yaml").write_text(yaml.safe_dump(CONFIG))
    done = pat(folder, 1, "--out", "one")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def weights(path: Path) -> dict[str, Any]:
    return load_pruned(PlainNet(), path / "pruned.safetensors").state_dict()


def check_same(mine: Path, theirs: Path) -> None:
    one, other = weights(mine), weights(theirs)
    assert any(one[name].shape != value.shape for name, value in PlainNet().state_dict().items()), "nothing was removed"
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=1e-5)


def test_two_processes_run_as_one(folder):
    done = pat(folder, 2, "--out", "two")
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
    died = pat(folder, 2, "--out", f"died{passes}", DIE_AT=str(passes))
    assert died.returncode != 0 and "SIGKILL" in died.stderr
    assert not (folder / f"died{passes}" / "summary.json").exists()
    state = load_state(
        folder / f"died{passes}", {**yaml.safe_load((folder / f"died{passes}" / "config.yaml").read_text())}
    )
    assert state.epoch == (passes - 1) // 5
    done = pat(folder, 1, "--out", f"died{passes}", "--resume")
    assert done.returncode == 0 and f"epoch {state.epoch}" in done.stdout, done.stderr[-2000:]
    check_same(folder / "one", folder / f"died{passes}")


def test_batches_that_cannot_be_shared_are_refused(monkeypatch):
    monkeypatch.setattr(checks, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="batch_size: 63 images cannot be shared by 2 processes"):
        checks.check_share(63)
