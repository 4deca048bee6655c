"""Channels are pruned and removed in a data-parallel training as in one process on the same batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from channel_ranks import train
from on_ranks import on_ranks


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_two_processes_prune_like_one(criterion: str, tmp_path: Path) -> None:
    alone, (first, second) = train(criterion), on_ranks(2, tmp_path, train, criterion)
    assert alone["phase"] == first["phase"] == second["phase"] == "finetune"
    for name, keep in alone["masks"].items():
        assert torch.equal(keep, first["masks"][name]) and torch.equal(keep, second["masks"][name])
    assert any(not bool(keep.all()) for keep in alone["masks"].values())
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), "bit by bit on both ranks"
        torch.testing.assert_close(value, alone["model"][name], rtol=1e-4, atol=1e-6)
