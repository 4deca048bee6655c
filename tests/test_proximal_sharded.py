"""Weights sharded over two processes (DTensor, FSDP2) end as unsharded ones do, for every grouper."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fsdp_worker import SHARDS_ON_CPU

SCRIPT = Path(__file__).parent / "proximal_sharded.py"


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no distributed")
@pytest.mark.skipif(not SHARDS_ON_CPU, reason="this PyTorch's fully_shard cannot run on the CPU")
@pytest.mark.parametrize(
    "what",
    ["rows", pytest.param("columns", marks=pytest.mark.slow), pytest.param("whole", marks=pytest.mark.slow)],
)
def test_two_processes_end_as_one(what: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT), what]
    root = str(SCRIPT.parent.parent)
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)  # noqa: S603
    assert done.returncode == 0, done.stderr[-3000:]
