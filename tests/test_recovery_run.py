"""``pat run`` with ``recovery``: rates, epochs and weights that it ends with, resumed runs, its teacher, its texts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_fixture import tiny
from safetensors.torch import load_file
from typer.testing import CliRunner

from pruningawaretraining.cli.main import app
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.experiment import record
from pruningawaretraining.experiment.datasets import load_data
from pruningawaretraining.experiment.display import Display
from pruningawaretraining.experiment.recovering import RunRecovery
from pruningawaretraining.experiment.run import run_experiment
from pruningawaretraining.experiment.runner import Runner
from pruningawaretraining.experiment.schema import ExperimentConfig
from pruningawaretraining.experiment.state import RunState

RULES = tiny()["pruning"]["rules"]  # channels go in epochs 1 and 2
ALL = {
    "rate": {"to": 0, "warmup": 1},
    "average": {"type": "ema", "decay": 0.9, "last": 0.4, "norm_batches": 5},
    "distillation": {"weight": 1.0},
    "budget": "macs",
}


class Killed(Exception):
    pass


def experiment(out: Path, recovery: dict[str, Any] | None, **changes: Any) -> ExperimentConfig:
    pruning = {"rules": changes.pop("rules", RULES), "recovery": recovery}
    changes = {"epochs": 6, "onnx": None, "latency": None, **changes}
    return ExperimentConfig.model_validate(tiny(**changes, pruning=pruning, out=str(out)))


def pruned_rows(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / record.METRICS).read_text().splitlines()]
    return [row for row in rows if row["model"] == "pruned"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("recovered") / "run"
    return folder, run_experiment(experiment(folder, ALL))


def test_epochs_are_added_for_the_macs_that_are_saved(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    found, rows = summary["recovery"], pruned_rows(folder)
    added = math.floor(3 / rows[-1]["macs"])
    assert found["began"] == 3 and found["costs"]["pruned"] == pytest.approx(rows[-1]["macs"])
    assert added > 3 and found["epochs"] == summary["epochs"] == len(rows) == 3 + added


def test_the_schedule_restarts_after_a_warm_up(finished: tuple[Path, dict[str, Any]]) -> None:
    """A cosine of 6 epochs, stepped after each; from epoch 3 on it is run through once more, stretched."""
    folder, summary = finished
    epochs = summary["epochs"]
    cosine = [0.05 * (1 + math.cos(math.pi * epoch / 6)) for epoch in range(6)]
    again = [cosine[int((epoch - 3) / (epochs - 3) * 6 + 1e-9)] for epoch in range(3, epochs)]
    assert [row["lr"] for row in pruned_rows(folder)] == pytest.approx([*cosine[:3], 0.0, *again[1:]])


def test_the_model_is_the_average_and_the_report_says_what_it_did(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    average, last = summary["recovery"]["average"], pruned_rows(folder)[-1]["accuracy"]
    assert average["from"] == summary["epochs"] - round(0.4 * (summary["epochs"] - 3))
    assert summary["recovery"]["last"] == last and summary["pruned"]["accuracy"] == average["accuracy"]
    page = (folder / record.REPORT).read_text()
    for text in ("ema, decay 0.9", f"{last:.2%} → {average['accuracy']:.2%}", "more epochs", "from the first step on"):
        assert text in page, text


def test_the_average_is_of_the_steps_of_the_last_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[torch.Tensor]] = []
    whole = RunRecovery.stepped

    def stepped(self: RunRecovery, model: torch.nn.Module) -> None:
        whole(self, model)
        if self._average is not None:
            seen.append([one.detach().clone() for one in model.parameters()])

    monkeypatch.setattr(RunRecovery, "stepped", stepped)
    options = {"average": {"type": "ema", "decay": 0.5, "last": 0.01, "norm_batches": 0}}
    run_experiment(experiment(tmp_path / "run", options, dense_baseline=False, epochs=4))
    expected = seen[0]
    for step in seen[1:]:
        expected = [0.5 * old + 0.5 * new for old, new in zip(expected, step, strict=True)]
    found = load_file(tmp_path / "run" / record.PRUNED)
    saved = [value for name, value in found.items() if name.endswith("stages.0.0.conv1.weight")]
    assert len(saved) == 1 and any(one.shape == saved[0].shape and torch.allclose(one, saved[0]) for one in expected)


@pytest.mark.parametrize("saved", [9, 11, 13], ids=["removed", "warm", "averaging"])
def test_resumed_equals_uninterrupted(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: int
) -> None:
    folder, whole = finished
    save, calls = Runner._save, 0

    def stopping(self: Runner, stage: Any, within: Any = None) -> None:
        nonlocal calls
        save(self, stage, within)
        calls += stage is not None
        if stage is not None and calls == saved:
            raise Killed

    monkeypatch.setattr(Runner, "_save", stopping)
    with pytest.raises(Killed):
        run_experiment(experiment(tmp_path / "run", ALL))
    monkeypatch.undo()
    torch.manual_seed(5)
    summary = run_experiment(experiment(tmp_path / "run", ALL), resume=True)
    expected, found = load_file(folder / record.PRUNED), load_file(tmp_path / "run" / record.PRUNED)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert summary["recovery"] == whole["recovery"]
    alike = [[{**row, "seconds": 0} for row in pruned_rows(one)] for one in (folder, tmp_path / "run")]
    assert alike[0] == alike[1]


def test_the_teacher_is_the_trained_baseline(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    config = experiment(folder, ALL)
    runner = Runner(config, load_data(config.data), torch.device("cpu"), Display())
    runner.state = RunState(stage="pruned")
    pruner = runner.new_stage("pruned").learner.pruner
    assert pruner is not None and pruner.teacher is not None
    dense, teacher = load_file(folder / record.DENSE), pruner.teacher.state_dict()
    assert all(torch.equal(dense[name], teacher[name]) for name in dense)


def test_a_run_without_a_dense_model_has_no_teacher(tmp_path: Path) -> None:
    config = experiment(tmp_path / "run", {"distillation": {}}, dense_baseline=False)
    with pytest.raises(ConfigError, match="recovery.distillation: no dense model is trained. Allowed: dense_baseline"):
        run_experiment(config)
    assert not (tmp_path / "run").exists()


def test_the_time_that_is_saved_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def seconds(models: dict[str, torch.nn.Module], loss: Any) -> dict[str, float]:
        asked.append([sum(one.numel() for one in models[name].parameters()) for name in ("dense", "pruned")])
        assert all(torch.isfinite(loss(one)) for one in models.values())
        return {"dense": 3.0, "pruned": 2.0}

    monkeypatch.setattr("pruningawaretraining.experiment.recovering.step_seconds", seconds)
    summary = run_experiment(experiment(tmp_path / "run", {"budget": "time"}, dense_baseline=False))
    assert len(asked) == 1 and asked[0][0] > asked[0][1]
    assert summary["epochs"] == 3 + math.floor(3 * 1.5) == len(pruned_rows(tmp_path / "run"))
    assert "66.7% of the dense model&#39;s time of a step" in (tmp_path / "run" / record.REPORT).read_text()


@pytest.mark.parametrize("kind", ["rate", "budget"])
def test_a_schedule_without_a_course_is_refused_before_the_run(tmp_path: Path, kind: str) -> None:
    options = {"rate": {"to": 0}} if kind == "rate" else {"budget": "macs"}
    config = experiment(tmp_path / "run", options, scheduler={"name": "ReduceLROnPlateau"})
    with pytest.raises(ConfigError, match="ReduceLROnPlateau has no course"):
        run_experiment(config)
    with pytest.raises(ConfigError, match="recovery.rate.to: 6 is not before the schedule's end, 6"):
        run_experiment(experiment(tmp_path / "run", {"rate": {"to": 6}}))


def test_rates_of_a_recipe_go_back_too(tmp_path: Path) -> None:
    rates = [{"start_epoch": 0, "end_epoch": 6, "lr_func": "linear", "init_lr": 0.12, "final_lr": 0.0}]
    config = experiment(tmp_path / "run", {"rate": {"to": 3, "peak": 0.5}}, rates=rates, dense_baseline=False)
    run_experiment(config)
    found = [row["lr"] for row in pruned_rows(tmp_path / "run")]
    assert found == pytest.approx([0.12, 0.10, 0.08, 0.03, 0.02, 0.01])


def test_rates_go_back_at_every_event_beside_weights_that_do(tmp_path: Path) -> None:
    """Iterative rewinding: weights go back to the end of epoch 0, after 5 steps, and the schedule to epoch 1."""
    rates = [{"start_epoch": 0, "end_epoch": 8, "lr_func": "linear", "init_lr": 0.08, "final_lr": 0.0}]
    rule = {
        **{"pattern": "unstructured", "start": 1, "end": 3, "every": 2, "target": {"sparsity": 0.8}},
        "dynamic": {"type": "rewind", "to": 5},
    }
    options = {"rate": {"to": 1, "at": "events"}}
    run_experiment(experiment(tmp_path / "run", options, rules=[rule], rates=rates, epochs=8, dense_baseline=False))
    first = [1 + part / 6 * 7 for part in (0, 1)]  # of the schedule, whose 7 epochs are run in 6
    second = [1 + part / 4 * 7 for part in range(4)]
    reached = [math.floor(5 * epoch + 1e-9) / 5 for epoch in (0, 1, *first, *second)]  # its rates are those of steps
    assert [row["lr"] for row in pruned_rows(tmp_path / "run")] == pytest.approx([0.01 * (8 - one) for one in reached])


def test_single_weights_recover_and_keep_their_zeros(tmp_path: Path) -> None:
    rule = {"pattern": "unstructured", "start": 1, "end": 2, "target": {"sparsity": 0.8}}
    options = {"average": {"type": "swa", "last": 1.0}, "budget": "macs"}
    summary = run_experiment(experiment(tmp_path / "run", options, rules=[rule], dense_baseline=False))
    assert summary["recovery"]["began"] == 3 and summary["epochs"] == 6  # zeros save no MACs
    assert summary["recovery"]["average"]["from"] == 3
    weights = [one for name, one in load_file(tmp_path / "run" / record.PRUNED).items() if one.dim() > 1]
    assert sum(int((one == 0).sum()) for one in weights) / sum(one.numel() for one in weights) > 0.75


def test_pruning_that_is_never_over_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rule = {**RULES[0], "end": 3}
    with caplog.at_level("INFO", logger="pruningawaretraining"):
        summary = run_experiment(
            experiment(tmp_path / "run", {"rate": {}}, rules=[rule], epochs=4, dense_baseline=False)
        )
    assert "rules[0].end: 3 is the last epoch: no epoch is left for the recovery after pruning" in caplog.text
    assert summary["recovery"]["began"] is None and summary["recovery"]["average"] is None
    assert "pruning was not over before the training" in (tmp_path / "run" / record.REPORT).read_text()


def test_a_family_recovers_after_its_last_member(tmp_path: Path) -> None:
    rule = {"start": 1, "end": 4, "hold": 2, "target": {"macs": [0.8, 0.6]}}
    options = {"average": {"last": 1.0, "norm_batches": 1}}
    summary = run_experiment(experiment(tmp_path / "run", options, rules=[rule], epochs=7, dense_baseline=False))
    phases = [row["phase"] for row in pruned_rows(tmp_path / "run")]
    assert summary["recovery"]["began"] == 1 + max(number for number, one in enumerate(phases) if one == "prune")
    assert summary["family"][-1]["accuracy"] == summary["recovery"]["average"]["accuracy"]


def test_check_shows_the_block(tmp_path: Path) -> None:
    path = tmp_path / "pruning.yaml"
    path.write_text(json.dumps({"rules": RULES, "recovery": ALL}))
    shown = CliRunner().invoke(app, ["check", str(path)])
    assert shown.exit_code == 0, shown.output
    lines = list(lines_from(shown.output, "recovery, once pruning is over"))
    assert lines == [
        "rate          the schedule from epoch 0 on, in the epochs left, after a warm-up of 1 epochs",
        "average       ema, decay 0.9, over the last 40% of these epochs",
        "distillation  weight 1, temperature 2, from the start",
        "budget        more epochs, for the macs that the pruned model saves",
    ]


def lines_from(text: str, heading: str) -> Iterator[str]:
    lines = iter(text.splitlines())
    for line in lines:
        if line == heading:
            break
    yield from (line.strip() for line in lines if line.startswith("  "))
