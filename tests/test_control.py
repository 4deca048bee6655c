"""What a regulariser did before pruning, against the dense baseline."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pruningawaretraining.analysis.compare import numbers, page, start_of, told
from pruningawaretraining.analysis.compare_figures import compared, energy_figure
from pruningawaretraining.analysis.control import effect, effect_text
from pruningawaretraining.experiment.record import EDGES, NORMS, Recorder, histogram
from pruningawaretraining.report.run import Run

MIDDLES = [math.sqrt(left * right) for left, right in zip(EDGES, EDGES[1:], strict=False)]


def at(epoch: int, phase: str, *norms: float, zeros: int = 0) -> dict[str, Any]:
    found = histogram(torch.tensor([*norms, *[0.0] * zeros]))
    return {"epoch": epoch, "phase": phase, "sets": {"conv1": found}}


def run_of(dense: list[dict[str, Any]] | None = None, summary: dict[str, Any] | None = None) -> Run:
    one, ten = MIDDLES[96], MIDDLES[112]  # a decade apart: the squares differ by 100
    epochs = [
        at(0, "regularize", one, one, one, one),
        at(1, "regularize", MIDDLES[80], one, one, ten),
        at(2, "prune", one, one, ten, zeros=1),
        at(3, "finetune", one, one, ten),
    ]
    norms = {"edges": list(EDGES), "epochs": epochs, **({} if dense is None else {"dense": dense})}
    return Run(summary or {}, norms=norms)


DENSE = [at(0, "train", *[MIDDLES[96]] * 4), at(1, "train", *[MIDDLES[96]] * 4), at(2, "train", *[MIDDLES[96]] * 4)]


def test_the_energy_of_the_lowest_groups_is_compared_with_the_dense_model() -> None:
    found = effect(run_of(DENSE))
    assert found is not None and (found.groups, found.of) == (1, 4)
    assert found.energy == [(0, pytest.approx(0.25)), (1, pytest.approx(0.01 / 102.01, rel=1e-6))]
    assert found.control == [(0, pytest.approx(0.25)), (1, pytest.approx(0.25))]
    assert found.relative[-1] == (1.0, pytest.approx(0.04 / 102.01))
    said = effect_text(found)
    assert "After epoch 1 the 1 lowest of 4 groups" in said and "0.0% of the sum of squares, 25.0% in the dense" in said


@pytest.mark.parametrize("dense", [None, [], [{"epoch": 1, "phase": "train", "sets": {}}]])
def test_without_a_dense_model_of_the_same_sets_that_is_said(dense: list[dict[str, Any]] | None) -> None:
    found = effect(run_of(dense))
    assert found is not None and not found.control and not found.relative
    assert effect_text(found).endswith("there is no dense model to compare with.")


def test_nothing_is_said_where_nothing_was_removed() -> None:
    norms = {"edges": list(EDGES), "epochs": [at(0, "regularize", 1.0, 1.0)], "dense": DENSE[:1]}
    assert effect(Run({}, norms=norms)) is None and effect(Run({})) is None and effect_text(None) == ""


@pytest.mark.parametrize(
    ("accuracy", "ending"),
    [
        (0.99, "99.00%, as its dense model (99.00%): the ranking chose well without a gap."),
        (0.90, "dense model (99.00%): regularise longer or more strongly, prune less, or train longer afterwards."),
        (None, "25.0% in the dense model of that epoch."),
    ],
)
def test_advice_without_a_gap_depends_on_the_accuracy(accuracy: float | None, ending: str) -> None:
    summary = {"dense": {"accuracy": 0.99}, "pruned": {"accuracy": accuracy}}
    one = compared("a", run_of(DENSE, summary))
    assert not one.choice.separated and told(one).endswith(ending)
    beside = told(one, alone=False)
    assert "regularise" not in beside and (accuracy is None or f"ended at {accuracy:.2%}" in beside)
    assert start_of(one.choice) == "–"  # norms that have not fallen apart speak for no epoch
    assert json.loads(json.dumps(numbers(one)))["effect"]["control"][1] == [1, pytest.approx(0.25)]


def test_one_run_is_drawn_beside_its_dense_model_and_several_relative_to_it() -> None:
    one, other = compared("a", run_of(DENSE)), compared("b", run_of(DENSE))
    alone, both = energy_figure([one]), energy_figure([one, other])
    assert alone is not None and [label for _, label in alone.legend] == ["dense", "a"]
    assert both is not None and [label for _, label in both.legend] == ["a", "b"] and "dense = 100%" in both.title
    assert page([one], "a")["curves"][0].title == "Energy of the lowest groups"


def test_norms_of_the_baseline_are_recorded_beside_and_kept_on_resuming(tmp_path: Path) -> None:
    row = {"loss": 0.1, "train_accuracy": 1.0, "accuracy": 1.0, "lr": 0.1, "macs": 1.0, "sparsity": 0.0, "seconds": 1.0}
    norms = {"conv1": torch.tensor([1.0, 2.0])}
    recorder = Recorder(tmp_path)
    for epoch in range(2):
        recorder.add({"model": "dense", "epoch": epoch, "phase": "train", **row}, norms)
    recorder.add({"model": "pruned", "epoch": 0, "phase": "regularize", **row}, norms)
    found = json.loads((tmp_path / NORMS).read_text())
    assert [one["epoch"] for one in found["dense"]] == [0, 1] and len(found["epochs"]) == 1
    assert len(Recorder(tmp_path, rows=1).control) == 1  # killed in the second dense epoch
    again = Recorder(tmp_path, rows=3, norms=1)
    assert (again.control, again.norms) == (found["dense"], found["epochs"])
    (tmp_path / NORMS).write_text(
        json.dumps({"edges": list(EDGES), "epochs": found["epochs"]})
    )  # of an earlier version
    assert Recorder(tmp_path, rows=3, norms=1).control == []
