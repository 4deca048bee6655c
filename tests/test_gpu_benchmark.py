"""benchmarks/gpu.py away from a GPU: what it says there, what a part that fails leaves, and that nothing is saved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return pytest.importorskip("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line_and_exit_code_2() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "benchmarks/gpu.py: no CUDA device here. Allowed: --device cpu --tiny for a dry run\n"


def test_a_part_that_fails_is_a_row_and_the_others_are_measured(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(setting: Any) -> Any:
        raise RuntimeError("out of memory\nmore")

    works = [gpu.row("event", 12.3456, "ms", 30.0, torchao_ms=40.0)]
    monkeypatch.setattr(gpu, "PARTS", {"first": fails, "second": lambda setting: works})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny"])
    before = {path: path.read_bytes() for path in (BENCHMARKS / "results").iterdir()}
    assert gpu.main() == 1
    assert before == {path: path.read_bytes() for path in (BENCHMARKS / "results").iterdir()}
    said = capsys.readouterr()
    path = Path(said.out.partition("so kept apart: ")[2].partition(". All of it")[0])
    failed, measured = json.loads(path.read_text())["rows"]
    assert (failed["measured"], failed["found"]) == ("first", "failed")
    assert failed["beside"] == "RuntimeError: out of memory"
    expected = {"found": "12.35", "unit": "ms", "goal": "at most 30", "met": "yes", "beside": "torchao ms 40"}
    assert measured == {"measured": "event", **expected}
    assert said.err.endswith("failed: first\n")


@pytest.mark.parametrize(
    ("found", "unit", "goal", "met"),
    [
        (1.03, "of the bare step", 1.03, "yes"),
        (1.04, "of the bare step", 1.03, "no"),
        (0.9, "times faster", 1.0, "no"),
        (1.0, "times faster", 1.0, "yes"),
        (7.0, "s", None, ""),
    ],
)
def test_goals(gpu: Any, found: float, unit: str, goal: float | None, met: str) -> None:
    assert gpu.row("this", found, unit, goal)["met"] == met


def test_a_part_measures(gpu: Any) -> None:
    """The events, on 65,536 weights of a CPU."""
    rows = gpu.PARTS["events"](gpu.Setting(torch.device("cpu"), tiny=True))
    assert [row["measured"] for row in rows] == [
        f"event of {pattern}, 0.0655 million weights" for pattern in ("unstructured", "2:4", "4x1")
    ]
    assert all(float(row["found"]) > 0 and row["goal"] == "at most 30" for row in rows)
