"""Tests of a GPU: all are skipped with one line where there is none; ``--device cpu`` runs what the CPU can, small."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("gpu_training")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once by cuBLAS; only deterministic runs need it


def chosen(config: pytest.Config) -> torch.device:
    """What ``--device`` says."""
    return torch.device(config.getoption("--device"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if chosen(item.config).type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: tests/gpu skipped")  # from one line, so that the summary has one line


@pytest.fixture
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where the tests run."""
    return chosen(pytestconfig)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device, for tests of what the CPU does not have."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    return device


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
