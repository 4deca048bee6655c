"""DistributedDataParallel and FSDP2 on nccl, with one process; the CPU takes gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def launch(what: str, device: torch.device, folder: Path) -> dict[str, Any]:
    paths = [str(ROOT), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    script = [str(HERE / "process_worker.py"), what, device.type, str(folder / "found.json")]
    done = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    assert found["backend"] == ("nccl" if device.type == "cuda" else "gloo")
    return found


@pytest.mark.parametrize(("what", "kind"), [("ddp", "DistributedDataParallel"), ("fsdp", "DTensor")])
def test_one_process(device: torch.device, tmp_path: Path, what: str, kind: str) -> None:
    found = launch(what, device, tmp_path)
    assert found["kind"] == kind
    assert found["masked"] > 0
    assert found["phase"] == "finetune"
    assert 0.4 <= found["fraction"] <= 0.5  # the channels are few: one more is up to a tenth of the MACs
