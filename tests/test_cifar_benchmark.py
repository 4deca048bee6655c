"""The CIFAR-10 benchmark: what is drawn and tabled, without its data."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from pruningawaretraining.experiment.models import CifarResNet

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cifar_medium
import cifar_medium_training
import cifar_medium_ways
import cifar_resnet56
import cifar_training
import run_all


def test_augmented_images_are_crops_of_the_padded_ones_some_flipped():
    images = torch.rand(12, 3, 8, 8)
    drawn = cifar_training.augmented(images, torch.Generator().manual_seed(0))
    padded = functional.pad(images, (4, 4, 4, 4))
    found = []
    for number, one in enumerate(drawn):
        crops = {
            (row, column, flip): padded[number, :, row : row + 8, column : column + 8].flip(-1)
            if flip
            else padded[number, :, row : row + 8, column : column + 8]
            for row in range(9)
            for column in range(9)
            for flip in (False, True)
        }
        found.append(next(place for place, crop in crops.items() if torch.equal(crop, one)))
    assert {flip for _, _, flip in found} == {False, True}
    assert len({(row, column) for row, column, _ in found}) > 6


def test_the_rate_is_constant_and_then_falls_to_nothing():
    budget = cifar_training.BUDGETS["full"]
    first = cifar_training.Phase(budget, 0, 0, budget.sparse_epochs, math.inf, tuning=False)
    second = cifar_training.Phase(budget, 0, 0, budget.tune_epochs, math.inf, tuning=True)
    assert first.rate(0) == first.rate(budget.sparse_epochs) == second.rate(0) == budget.lr
    assert second.rate(budget.tune_epochs / 2) == pytest.approx(budget.lr / 2)
    assert second.rate(budget.tune_epochs) == pytest.approx(0)


def test_the_table_has_means_and_spreads_over_seeds():
    def run(seed: int, after: float) -> dict[str, object]:
        return {
            "way": "tp_l1",
            "target": 2.11,
            "seed": seed,
            "dense": 93.0,
            "before": 50.0,
            "after": after,
            "reduction": 2.12,
            "seconds": 3.0,
        }

    (row,) = cifar_resnet56.table([run(0, 90.0), run(1, 92.0)])
    assert (row["after"], row["drop from dense"], row["seeds"]) == ("91.00 ± 1.41", "2.00 ± 1.41", 2)
    assert (row["before fine-tuning"], row["MACs, times fewer"]) == ("50.00 ± 0.00", "2.120")


def test_data_is_handed_to_the_benchmarks_that_take_it(tmp_path):
    found = run_all.commands(["mac_target", "cifar_resnet56"], tmp_path)
    assert found == [["mac_target.py"], ["cifar_resnet56.py", "--budget", "small", "--data", str(tmp_path)]]
    assert run_all.commands(["one_shot_cifar"], None) == [["one_shot_cifar.py"]]


class FakeLoader:
    """Noise in the shapes of CIFAR-10, and weights that were never trained."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.state = CifarResNet(56).state_dict()

    def cifar10(self, split: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
        draw = np.random.default_rng(0)
        return draw.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8), draw.integers(0, 10, 16), []

    def cifar_resnet_state(self, depth: int) -> dict[str, torch.Tensor]:
        return self.state


@pytest.mark.slow
@pytest.mark.parametrize("key", ["rec_first", "l2_first", "growing", "tp_l1"])
def test_a_run_that_is_stopped_and_gone_on_with_ends_as_one_that_is_not(key, tmp_path, monkeypatch):
    budget = replace(cifar_training.BUDGETS["small"], images=16, test=(0, 16), batch=8, tune_epochs=2)
    loader = FakeLoader()
    data = cifar_training.Data.load(loader, budget, torch.device("cpu"))
    (way,) = (one for one in cifar_resnet56.WAYS if one.key == key)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = cifar_resnet56.Run(tmp_path / "whole", way, 2.11, 0, budget).run(loader, data, 10.0, math.inf)

    def stopping(model, optimizer, data, phase, *others):
        if phase.first == 1:
            raise cifar_training.OutOfTime
        cifar_training.train(model, optimizer, data, phase, *others)

    stopped = cifar_resnet56.Run(tmp_path / "parts", way, 2.11, 0, budget)
    with monkeypatch.context() as patch:
        patch.setattr(cifar_resnet56, "train", stopping)
        with pytest.raises(cifar_training.OutOfTime):
            stopped.run(loader, data, 10.0, math.inf)
    assert stopped.checkpoint.is_file() and not stopped.done
    found = stopped.run(loader, data, 10.0, math.inf)
    assert stopped.done and not stopped.checkpoint.exists()
    assert {**found, "seconds": 0} == {**whole, "seconds": 0}
    assert found["reduction"] >= 2.11


class Loader20(FakeLoader):
    """The same for ResNet-20, which the medium form trains."""

    def __init__(self) -> None:
        super().__init__()
        self.state = CifarResNet(20).state_dict()


def medium(folder: Path, key: str, **changes: Any) -> tuple[Any, Any]:
    form = replace(cifar_medium_training.Form(), **{"epochs": 2, "batch": 4, "averaged": 1, **changes})
    (way,) = (one for one in cifar_medium_ways.WAYS if one.key == key)
    folder.mkdir(exist_ok=True)
    run = cifar_medium_training.Run(folder, way, way.targets[0], 0, form)
    return run, cifar_medium_training.Images(Loader20(), form)


@pytest.mark.parametrize("key", ["dense_taught", "n24_ste"])
def test_a_medium_run_that_is_stopped_ends_as_one_that_is_not(key, tmp_path, monkeypatch):
    run, images = medium(tmp_path / "whole", key)
    whole = run.run(Loader20(), images)
    run, images = medium(tmp_path / "parts", key)
    save = run._save

    def stopping(state):
        save(state)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_save", stopping)
    with pytest.raises(KeyboardInterrupt):
        run.run(Loader20(), images)
    assert run.state_file.is_file() and not run.file.exists()
    found = medium(tmp_path / "parts", key)[0].run(Loader20(), images)
    assert {**found, "seconds": 0} == {**whole, "seconds": 0}
    assert found["zeros"] == (0.5 if key == "n24_ste" else 0)
    assert json.loads(run.file.read_text()) == found and not run.state_file.exists()


def test_trials_never_train_on_what_they_are_tested_on_and_rows_never_hold_out(tmp_path):
    _, images = medium(tmp_path, "dense", held_out=6)
    assert (len(images.labels_B), len(images.test.labels)) == (10, 6)
    pixels, labels, _ = Loader20().cifar10("train")
    assert images.labels_B.tolist() == labels[:10].tolist() and images.test.labels.tolist() == labels[10:].tolist()
    _, images = medium(tmp_path, "dense")
    assert (len(images.labels_B), len(images.test.labels)) == (16, 16)


def test_the_rate_of_the_medium_form_warms_up_and_falls_to_nothing():
    form = cifar_medium_training.Form(epochs=10, rate=0.1, warm=1.0)
    assert form.rate_at(0) == pytest.approx(0.002)
    assert form.rate_at(5) == pytest.approx(0.05)
    assert form.rate_at(10) == pytest.approx(0)


def test_rows_that_are_there_stay_when_others_are_added(tmp_path, monkeypatch):
    def run(key: str, way: str, **more: Any) -> dict[str, Any]:
        numbers = {"after": 90.0, "averaged": 91.0, "reduction": 2.0, "zeros": 0.0, "seconds": 60.0, "dense": 91.7}
        return {"key": key, "way": way, "target": 2.11, "seed": 0, "rate": 0.02, "epochs": 10, **numbers, **more}

    monkeypatch.setattr(cifar_medium, "RESULTS", tmp_path)
    (tmp_path / "table.json").write_text(json.dumps({"runs": [run("ours-2.11", "ours")]}))
    (tmp_path / "tp_l1-2.11-seed0.json").write_text(json.dumps(run("tp_l1-2.11", "tp_l1", after=89.0)))
    (tmp_path / "choose-4-0.02-dense-seed0.json").write_text(json.dumps(run("dense", "dense", accuracies=[90.0])))
    runs, trials = cifar_medium.collected(tmp_path, "table")
    assert [one["key"] for one in runs] == ["ours-2.11", "tp_l1-2.11"] and [one["key"] for one in trials] == ["dense"]
    assert [(row["who"], row["accuracy"]) for row in cifar_medium.table(runs)] == [
        ("this library", "90.00"),
        ("Torch-Pruning", "89.00"),
    ]
