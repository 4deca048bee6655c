"""Weights sharded over two processes (DTensor, FSDP2) end as unsharded ones do, for every grouper."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fsdp_worker import SHARDS_ON_CPU
from on_ranks import on_ranks
from proximal_sharded import check


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no distributed")
@pytest.mark.skipif(not SHARDS_ON_CPU, reason="this PyTorch's fully_shard cannot run on the CPU")
@pytest.mark.parametrize(
    "what",
    ["rows", pytest.param("columns", marks=pytest.mark.slow), pytest.param("whole", marks=pytest.mark.slow)],
)
def test_two_processes_end_as_one(what: str, tmp_path: Path) -> None:
    assert on_ranks(2, tmp_path, check, what) == [None, None]
