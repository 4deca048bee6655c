"""The text example: a small BERT learns, is pruned exactly as asked under a teacher, and its table says so."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest


@pytest.mark.slow
def test_sparse_models_are_as_good_as_the_dense_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    example = importlib.import_module("text")
    rows = example.main(["--out", str(tmp_path), "--steps", "150", "--sparse-steps", "100"])
    assert [row["model"] for row in rows] == ["dense", "dense, trained on", "4x1", "2:4"]
    dense, _, blocks, windows = rows
    assert dense["accuracy"] > 0.6
    assert blocks["sparsity"] == pytest.approx(0.8, abs=1e-4)
    assert windows["sparsity"] == 0.5
    assert max(blocks["drop"], windows["drop"]) < 0.05
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| 2:4 | 50.0% |" in table
    assert json.loads((tmp_path / "rows.json").read_text(encoding="utf-8")) == rows


def test_files_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    example = importlib.import_module("text")
    path = tmp_path / "train.tsv"
    path.write_text("1\tgood , good film\n0\tbad film\n\n", encoding="utf-8")
    lines = example.read_lines(path)
    assert lines == [("1", "good , good film"), ("0", "bad film")]
    train, test, words, labels = example.numbered(lines, [("0", "a good film")])
    assert (words, labels) == (5, 2)
    assert train.words == [[2, 3, 1, 3, 4], [2, 1, 4]]
    assert (test.words, test.labels) == ([[2, 1, 3, 4]], [0])
    ((batch, targets),) = train.batches(2)
    assert batch.tolist() == [[2, 1, 4, 0, 0], [2, 3, 1, 3, 4]]
    assert targets.tolist() == [0, 1]


def test_one_step_with_all_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    example = importlib.import_module("text")
    small = ["--out", str(tmp_path), "--steps", "1", "--sparse-steps", "3", "--batch-size", "8"]
    rows = example.main(small)
    assert [round(row["sparsity"], 3) for row in rows] == [0.0, 0.0, 0.8, 0.5]
