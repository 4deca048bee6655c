"""The proximal example: trained on real data, its pruned model meets the MAC target, and it ends in the report."""

from __future__ import annotations

import importlib.util
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "proximal.py"


def test_the_example_meets_its_target(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("proximal_example", EXAMPLE)  # benchmarks have a proximal.py too
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    summary = example.main(epochs=4, macs=0.6, out=str(tmp_path / "run"))
    assert summary["pruned"]["macs"] <= 0.6 * summary["dense"]["macs"]
    assert summary["pruned"]["macs"] >= 0.5 * summary["dense"]["macs"]
    found = summary["verification"]
    assert max(found[key] for key in ("masked_removed", "removed_reloaded", "reloaded_onnx")) < 1e-4 * found["scale"]
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
