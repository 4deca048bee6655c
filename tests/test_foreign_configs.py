"""The benchmark over files of other systems: its table of a file that runs, one that does not, and a bad one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]

RECIPE = """
pruning_modifiers:
  - !GlobalMagnitudePruningModifier
    {params: [a.one.weight, a.two.weight], init_sparsity: 0.25, final_sparsity: 0.5, start_epoch: 0, end_epoch: 1,
     update_frequency: 1, log_types: all}
"""


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("foreign_configs", ROOT / "benchmarks" / "foreign_configs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "foreign_configs", module)
    spec.loader.exec_module(module)
    return module


def test_rows_and_the_page(benchmark: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "other.yaml").write_text(RECIPE.replace("a.one.weight, a.two.weight", "re:nothing"), encoding="utf-8")
    (tmp_path / "bad.yaml").write_text("a: 1\n", encoding="utf-8")
    rows = [benchmark.row_of(tmp_path / f"{name}.yaml", tmp_path, {}) for name in ("some", "other", "bad")]
    assert rows[0] == ["some.yaml", "sparseml", "yes", "0.500 (asked 0.5) on linear layers of these names", "log_types"]
    assert rows[1][2:4] == ["yes", "no fitting model"]
    assert rows[2][2].startswith("no: config: no form has the keys 'a'")
    page = benchmark.page(rows)
    assert "2 of 3 files load, 1 run." in page
    assert page.count("\n| ") == 4
