"""The proximal example: trained on real data, its pruned model meets the MAC target, and it ends in the report."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest


def test_the_example_meets_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    example = importlib.import_module("proximal")
    summary = example.main(epochs=4, macs=0.6, out=str(tmp_path / "run"))
    assert summary["pruned"]["macs"] <= 0.6 * summary["dense"]["macs"]
    assert summary["pruned"]["macs"] >= 0.5 * summary["dense"]["macs"]
    found = summary["verification"]
    assert max(found[key] for key in ("masked_removed", "removed_reloaded", "reloaded_onnx")) < 1e-4 * found["scale"]
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
