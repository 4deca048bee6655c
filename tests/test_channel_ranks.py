"""Channels are pruned and removed in a data-parallel training as in one process on the same batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parent / "channel_ranks.py"


def run(folder: Path, criterion: str, ranks: int) -> list[dict[str, Any]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(SCRIPT), str(folder), criterion]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}of{ranks}.pt", weights_only=True) for rank in range(ranks)]


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_two_processes_prune_like_one(criterion: str, tmp_path: Path) -> None:
    (alone,), (first, second) = run(tmp_path, criterion, 1), run(tmp_path, criterion, 2)
    assert alone["phase"] == first["phase"] == second["phase"] == "finetune"
    for name, keep in alone["masks"].items():
        assert torch.equal(keep, first["masks"][name]) and torch.equal(keep, second["masks"][name])
    assert any(not bool(keep.all()) for keep in alone["masks"].values())
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), "bit by bit on both ranks"
        torch.testing.assert_close(value, alone["model"][name], rtol=1e-4, atol=1e-6)
