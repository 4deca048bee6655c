"""The experiment runner: what a run leaves behind, resuming, and what is refused before anything is spent."""

from __future__ import annotations

import importlib
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from experiment_fixture import tiny
from rich.console import Console
from safetensors.torch import load_file

from pruningawaretraining import count_macs, load_pruned
from pruningawaretraining.errors import CheckpointError, ConfigError, ModelError, PruningError
from pruningawaretraining.experiment import record, runner
from pruningawaretraining.experiment.build import build_model
from pruningawaretraining.experiment.data import Pipeline
from pruningawaretraining.experiment.datasets import load_data
from pruningawaretraining.experiment.optim import build_optimizer, build_scheduler, step_scheduler
from pruningawaretraining.experiment.run import run_experiment
from pruningawaretraining.experiment.runner import Runner
from pruningawaretraining.experiment.schema import ExperimentConfig, load_experiment
from pruningawaretraining.experiment.train import Precision, evaluate


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / record.METRICS).read_text().splitlines()]


def run(folder: Path, *, resume: bool = False, overwrite: bool = False, **changes: Any) -> dict[str, Any]:
    config = ExperimentConfig.model_validate(tiny(out=str(folder), **changes))
    return run_experiment(config, resume=resume, overwrite=overwrite)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run(folder)
    return folder


def test_a_run_leaves_every_file_behind(finished: Path) -> None:
    summary = json.loads((finished / record.SUMMARY).read_text())
    assert {path.name for path in finished.iterdir()} == {*summary["files"], record.CHECKPOINT}
    assert set(summary["files"]) == set(record.FILES) - {record.CHECKPOINT}
    assert "<html" in (finished / record.REPORT).read_text()


def test_the_summary_is_true(finished: Path) -> None:
    """Every figure is measured again from the files."""
    summary = json.loads((finished / record.SUMMARY).read_text())
    config = load_experiment(finished / record.CONFIG)
    data = load_data(config.data)
    model = load_pruned(build_model(config.model, 10, 1), finished / record.PRUNED)
    example = torch.zeros(1, 1, 8, 8)
    assert summary["pruned"]["macs"] == count_macs(model, example) <= 0.6 * summary["dense"]["macs"]
    assert summary["pruned"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert summary["pruned"]["bytes"] == (finished / record.PRUNED).stat().st_size < summary["dense"]["bytes"]
    batches = list(Pipeline(data.mean, data.std).test(data.test, 500, torch.device("cpu")))
    precision = Precision.of(config, torch.device("cpu"))
    assert summary["pruned"]["accuracy"] == evaluate(model, iter(batches), precision)
    session = onnxruntime.InferenceSession(str(finished / record.ONNX))
    scores = session.run(None, {session.get_inputs()[0].name: batches[0][0].numpy()})[0]
    right = (torch.from_numpy(scores).argmax(1) == batches[0][1]).float().mean()
    assert summary["verification"]["onnx_accuracy"] == pytest.approx(float(right))
    dense = build_model(config.model, 10, 1)
    dense.load_state_dict(load_file(finished / record.DENSE))
    assert summary["dense"]["accuracy"] == evaluate(dense, iter(batches), precision)
    assert summary["dense"]["macs"] == count_macs(dense, example)


def test_masked_removed_reloaded_and_onnx_agree(finished: Path) -> None:
    found = json.loads((finished / record.SUMMARY).read_text())["verification"]
    assert found["masked_removed"] <= 1e-5 * found["scale"]
    assert found["removed_reloaded"] == 0.0
    assert found["reloaded_onnx"] <= 1e-4 * found["scale"]


def test_metrics_tell_the_phases(finished: Path) -> None:
    rows = rows_of(finished)
    assert [(row["model"], row["epoch"]) for row in rows] == [(m, e) for m in ("dense", "pruned") for e in range(4)]
    assert [row["phase"] for row in rows] == ["train"] * 4 + ["regularize", "prune", "prune", "finetune"]
    macs = [row["macs"] for row in rows]
    assert macs[:5] == [1.0] * 5 and 0.6 < macs[5] < 1 and macs[6] == macs[7] <= 0.6
    assert all(row["seconds"] > 0 and math.isfinite(row["loss"]) for row in rows)
    rates = [row["lr"] for row in rows[:4]]  # a cosine over the run, by default
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)])
    assert rates == [row["lr"] for row in rows[4:]]


@pytest.mark.parametrize(
    ("rule", "prune_at", "phases"),
    [
        ({"start": 1}, "end", ["regularize", "prune", "finetune"]),  # at once: the target is met by the first event
        ({"start": 1}, "begin", ["regularize", "prune", "finetune"]),
        ({"start": 0, "end": 2, "every": 2}, "end", ["prune", "prune", "prune"]),  # between two events
        ({"start": 7, "unit": "step"}, "end", ["regularize", "prune", "finetune"]),  # 5 steps an epoch
        ({"start": 0, "at_init": True}, "end", ["finetune"] * 3),
    ],
)
def test_an_epoch_is_named_by_what_happened_in_it(
    rule: dict[str, Any], prune_at: str, phases: list[str], tmp_path: Path
) -> None:
    rule = {"pattern": "unstructured", "target": {"sparsity": 0.5}, **rule}
    changes = {"epochs": 3, "dense_baseline": False, "prune_at": prune_at, "latency": None, "onnx": None}
    run(tmp_path / "run", pruning={"rules": [rule]}, **changes)
    assert [row["phase"] for row in rows_of(tmp_path / "run")] == phases


def test_norms_count_every_group(finished: Path) -> None:
    norms = json.loads((finished / record.NORMS).read_text())
    assert norms["edges"] == sorted(norms["edges"]) and len(norms["epochs"]) == 4
    for epoch in norms["epochs"]:
        for one in epoch["sets"].values():
            assert len(one["counts"]) == len(norms["edges"]) - 1
            assert sum(one["counts"]) + one["zeros"] == one["size"]
    zeros = [sum(one["zeros"] for one in epoch["sets"].values()) for epoch in norms["epochs"]]
    sizes = [sum(one["size"] for one in epoch["sets"].values()) for epoch in norms["epochs"]]
    assert zeros[0] == zeros[2] == zeros[3] == 0 < zeros[1]  # masked after the second epoch, removed after the third
    assert sizes[0] == sizes[1] > sizes[2] == sizes[3]


def test_the_resolved_config_runs_again(finished: Path) -> None:
    again = load_experiment(finished / record.CONFIG)
    assert again == ExperimentConfig.model_validate(tiny(out=str(finished)))


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.parametrize("prune_at", ["end", "begin"])
def test_events_take_place_at_the_end_of_an_epoch_or_at_its_begin(
    prune_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def watched(learner: Any, *rest: Any) -> tuple[float, float]:
        weights = torch.cat([weight.flatten() for weight in learner.model.parameters() if weight.dim() > 1])
        seen.append(float((weights == 0).double().mean()))
        return whole(learner, *rest)

    whole = runner.train_epoch
    monkeypatch.setattr(runner, "train_epoch", watched)
    last = 2 if prune_at == "end" else 3  # the end of the last epoch is the begin of one that is not trained
    rule = {
        "pattern": "unstructured",
        "start": last - 2,
        "end": last,
        "schedule": "linear",
        "target": {"sparsity": 0.75},
    }
    config = tiny(
        epochs=3, dense_baseline=False, pruning={"rules": [rule]}, out=str(tmp_path / "run"), prune_at=prune_at
    )
    run_experiment(ExperimentConfig.model_validate(config))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    reached = [json.loads(line)["sparsity"] for line in lines]
    assert reached[-1] == pytest.approx(0.75, abs=0.01)
    assert seen == pytest.approx([0.0, 0.25, 0.5], abs=0.01)


@pytest.mark.parametrize("epochs_before", [2, 5, 6, 7], ids=["dense", "regularize", "masked", "removed"])
@pytest.mark.parametrize("where", ["before", "after"])
def test_resumed_equals_uninterrupted(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs_before: int, where: str
) -> None:
    """Killed around the checkpoint of any epoch and resumed, a run ends with the same weights and metrics."""
    whole, calls = Runner._save, 0

    def save(self: Runner, stage: Any) -> None:
        nonlocal calls
        calls += stage is not None
        if where == "after":
            whole(self, stage)
        if stage is not None and calls == epochs_before:
            raise Killed
        if where == "before":
            whole(self, stage)

    monkeypatch.setattr(Runner, "_save", save)
    with pytest.raises(Killed):
        run(tmp_path)
    monkeypatch.undo()
    torch.manual_seed(123)
    summary = run(tmp_path, resume=True)
    for name in (record.PRUNED, record.DENSE):
        expected, found = load_file(finished / name), load_file(tmp_path / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    timeless = [[{**row, "seconds": 0} for row in rows_of(folder)] for folder in (finished, tmp_path)]
    assert timeless[0] == timeless[1]
    assert (tmp_path / record.NORMS).read_text() == (finished / record.NORMS).read_text()
    assert summary["verification"]["masked_removed"] is not None


def test_a_finished_run_is_not_overwritten(finished: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    with pytest.raises(ConfigError, match="holds a finished run. Allowed: another --out, or --overwrite"):
        run(finished)
    assert run(finished, resume=True) == json.loads((finished / record.SUMMARY).read_text())  # nothing left to do
    assert before == {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}


def test_bad_input_with_overwrite_leaves_the_old_run(finished: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    rules = [{"layers": ["stages.0.0.conv7"], "target": {"macs": 0.5}}]
    with pytest.raises(ConfigError, match="stages.0.0.conv7"):
        run(finished, overwrite=True, pruning={"rules": rules})
    assert before == {path.name: path.read_bytes() for path in finished.iterdir()}


def test_a_run_is_resumed_only_with_its_own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(self: Runner, name: str) -> None:
        self._save(None)
        raise Killed

    monkeypatch.setattr(Runner, "train", begin)
    with pytest.raises(Killed):
        run(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="holds an interrupted run. Allowed: --resume, --overwrite"):
        run(tmp_path)
    with pytest.raises(ConfigError, match=r"^optimizer.lr: 0.2 here, 0.1 there: the run in .* was started so"):
        run(tmp_path, resume=True, optimizer={"lr": 0.2})
    (tmp_path / record.CHECKPOINT).write_bytes((tmp_path / record.CHECKPOINT).read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 5, "optimizer": {"lr": 0.2}}, r"^epochs: 5 here, 4 there; optimizer.lr: 0.2 here, 0.1 there: the"),
        (
            {"pruning": {"rules": [{**tiny()["pruning"]["rules"][0], "start": 0, "target": {"macs": 0.7}}]}},
            r"^pruning.rules\[0\].start: 0 here, 1 there; pruning.rules\[0\].target.macs: 0.7 here, 0.6 there: the run",
        ),
        (
            {"pruning": {"rules": [{**tiny()["pruning"]["rules"][0], "regularizer": None}]}},
            r"^pruning.rules\[0\].regularizer: None here, 'growing_l2' with its options there: the run",
        ),
        (
            {"pruning": {"rules": tiny()["pruning"]["rules"] + [{"pattern": "2:4", "target": {"sparsity": 0.5}}]}},
            r"^pruning.rules: 2 entries here, 1 entries there: the run",
        ),
    ],
)
def test_a_finished_run_is_not_shown_as_another(finished: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(finished, resume=True, **changes)
    assert run(finished, resume=True, threads=2, name="other") == json.loads((finished / record.SUMMARY).read_text())


def test_what_a_kill_left_half_written_is_taken_away(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (folder / ".summary.json.abc.tmp").write_text("half")
    (folder / ".notes.tmp").write_text("the user's")
    report = (folder / record.REPORT).read_text()
    (folder / record.REPORT).unlink()
    run(folder, resume=True)  # killed after the summary, before the report
    assert (folder / record.REPORT).read_text() == report
    (folder / record.SUMMARY).unlink()
    run(folder, resume=True)
    assert [path.name for path in folder.glob(".*")] == [".notes.tmp"]


def test_what_is_only_masked_at_the_end_is_removed(tmp_path: Path) -> None:
    rules = [{"start": 0, "end": 50, "target": {"sparsity": 0.9}}]
    summary = run(tmp_path, epochs=2, dense_baseline=False, latency=None, onnx=None, pruning={"rules": rules})
    assert summary["pruned"]["macs"] < summary["dense"]["macs"]
    assert summary["verification"]["masked_removed"] <= 1e-5 * summary["verification"]["scale"]
    assert summary["dense"]["accuracy"] is None and summary["latency"] is None
    assert not (tmp_path / record.ONNX).exists()


def test_a_run_may_shrink_the_model_at_every_event(tmp_path: Path) -> None:
    rule = {"start": 0, "end": 2, "target": {"macs": 0.5}, "final_sparsity": 0.3, "application": "remove"}
    summary = run(tmp_path, dense_baseline=False, latency=None, onnx=None, pruning={"rules": [rule]})
    assert summary["pruned"]["macs"] <= 0.5 * summary["dense"]["macs"]
    sizes = [epoch["sets"] for epoch in json.loads((tmp_path / record.NORMS).read_text())["epochs"]]
    counts = [sum(one["size"] for one in sets.values()) for sets in sizes]
    assert counts[0] > counts[1] > counts[2] == counts[3]
    assert all(one["zeros"] == 0 for sets in sizes for one in sets.values())


def test_given_weights_are_the_dense_model_when_no_baseline_is_trained(finished: Path, tmp_path: Path) -> None:
    model = {"weights": str(finished / record.DENSE)}
    summary = run(tmp_path, epochs=1, model=model, dense_baseline=False, latency=None, onnx=None)
    dense = json.loads((finished / record.SUMMARY).read_text())["dense"]
    assert summary["dense"]["accuracy"] == dense["accuracy"]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains(tmp_path: Path, amp: str) -> None:
    summary = run(tmp_path, epochs=3, amp=amp, dense_baseline=False, latency=None, onnx=None, channels_last=True)
    rows = rows_of(tmp_path)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert summary["pruned"]["macs"] <= 0.6 * summary["dense"]["macs"]


BAD_RUNS: list[tuple[dict[str, Any], type[PruningError], str]] = [
    (
        {"model": {"name": "resnet19", "kwargs": {}}},
        ConfigError,
        "'resnet19' is not known; did you mean 'resnet",
    ),
    ({"model": {"name": "no.such.module:net"}}, ConfigError, "model.name: 'no.such.module' cannot be imported"),
    (
        {"model": {"name": "pruningawaretraining.experiment.models:DigitsResnet"}},
        ConfigError,
        "in pruningawaretraining.experiment.models: 'DigitsResnet' is not known; did you mean 'DigitsResNet'",
    ),
    (
        {"model": {"name": "builtins:dict", "kwargs": {}}},
        ConfigError,
        "does not say that it gives a network",
    ),
    (
        {"model": {"name": "torch.fx.graph_module:reduce_graph_module", "kwargs": {"body": {}, "import_block": "x"}}},
        ConfigError,
        "is a function of PyTorch, and some of these run text as code",
    ),
    (
        {"model": {"kwargs": {"width": 3}}},
        ConfigError,
        "kwargs.width: 'width' is not known; did you mean 'widths'",
    ),
    ({"model": {"kwargs": {"num_classes": 9}}}, ConfigError, "gives 9 scores. Allowed: one for each of 10 classes"),
    ({"model": {"kwargs": {"in_channels": 3}}}, ModelError, "rejects inputs of shape"),
    ({"model": {"weights": "nowhere.pt"}}, CheckpointError, "model.weights: there is no 'nowhere.pt'"),
    ({"data": {"name": "digit"}}, ConfigError, "data.name: 'digit' is not known; did you mean 'digits'"),
    ({"data": {"mean": [0.5, 0.5]}}, ConfigError, r"data.mean: \[0.5, 0.5\] has 2 values. Allowed: one for each of 1"),
    ({"optimizer": {"kwargs": {"momentun": 1}}}, ConfigError, "momentun' is not known; did you mean 'momentum'"),
    ({"optimizer": {"kwargs": {"momentum": -1}}}, ConfigError, "optimizer: SGD refuses lr=0.1, momentum=-1"),
    ({"scheduler": {"name": "StepLR"}}, ConfigError, "scheduler: StepLR refuses no arguments: .*step_size"),
    ({"device": "cuda:99"}, ConfigError, "device: 'cuda:99' is not available"),
    ({"pruning": {"rules": [{"target": {"macs": 0.5}, "max_sparsity": 0.1}]}}, PruningError, "target.macs"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), BAD_RUNS)
def test_bad_input_is_one_line_and_nothing_is_written(
    tmp_path: Path, changes: dict[str, Any], kind: type[PruningError], message: str
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(kind, match=message) as caught:
        run(folder, **changes)
    assert len(str(caught.value).splitlines()) == 1
    assert not folder.exists()


def test_a_diverging_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(PruningError, match=r"^optimizer.lr: 1e\+30 makes the training loss"):
        run(tmp_path, optimizer={"lr": 1e30})


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        (None, [0.1, 0.1, 0.1, 0.1]),
        ({"name": "CosineAnnealingLR"}, [0.1, 0.0853553, 0.05, 0.0146447]),
        ({"name": "CosineAnnealingLR", "kwargs": {"T_max": 2}}, [0.1, 0.05, 0.0, 0.05]),
        ({"name": "CosineAnnealingLR", "warmup": 2}, [0.0333333, 0.0666667, 0.1, 0.05]),
        ({"name": "StepLR", "kwargs": {"step_size": 2}}, [0.1, 0.1, 0.01, 0.01]),
        ({"name": "MultiStepLR", "kwargs": {"milestones": [1, 3]}}, [0.1, 0.01, 0.01, 0.001]),
        ({"name": "PolynomialLR"}, [0.1, 0.075, 0.05, 0.025]),
        ({"name": "ReduceLROnPlateau", "kwargs": {"patience": 0}}, [0.1, 0.1, 0.01, 0.001]),
    ],
)
def test_learning_rates(scheduler: dict[str, Any] | None, rates: list[float]) -> None:
    changes = tiny()
    changes["scheduler"] = scheduler
    config = ExperimentConfig.model_validate(changes)
    optimizer = build_optimizer(config.optimizer, torch.nn.Linear(2, 2))
    schedule, found = build_scheduler(config, optimizer), []
    for _ in rates:
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        step_scheduler(schedule, 1.0)
    assert found == pytest.approx(rates, abs=1e-6)


def test_paths_in_a_config_are_relative_to_it(tmp_path: Path) -> None:
    flat = {"start_epoch": 1, "end_epoch": 2, "interval": 1, "mac_target": 0.7, "layers_to_prune": ["stages"]}
    (tmp_path / "prune.json").write_text(json.dumps(flat))
    config = tiny(pruning="prune.json", data={"root": "images"})
    (tmp_path / "experiment.json").write_text(json.dumps(config))
    found = load_experiment(tmp_path / "experiment.json")
    assert found.data.root == str(tmp_path / "images")
    assert found.pruning.rules[0].target.macs == 0.7


def test_histogram_counts() -> None:
    found = record.histogram(torch.tensor([0.0, 0.0, 1e-9, 0.5, 1.0, 1.0, 1e9]))
    assert found["zeros"] == 2 and found["size"] == 7 and sum(found["counts"]) == 5
    filled = [(number, count) for number, count in enumerate(found["counts"]) if count]
    assert filled == [(0, 1), (91, 1), (96, 2), (159, 1)]
    for number, value in ((91, 0.5), (96, 1.0)):
        assert record.EDGES[number] <= value < record.EDGES[number + 1]


def test_a_terminal_shows_bars_and_the_last_epoch(tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=140)
    config = ExperimentConfig.model_validate(tiny(out=str(tmp_path), latency=None, onnx=None, epochs=2))
    run_experiment(config, console=console)
    assert "1/1" in screen.getvalue() and "acc " in screen.getvalue() and "━" in screen.getvalue()


@pytest.mark.parametrize(("example", "least"), [("train_loop", 0.85), ("pruning_loop", 0.85)])
def test_examples_run(example: str, least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(example).main(9) > least
    assert (tmp_path / "runs" / example / "pruned.safetensors").is_file()


@pytest.mark.parametrize("more", [{}, {"application": "remove"}], ids=["mask", "remove"])
def test_a_compensated_model_is_compared_as_it_was_masked(more: dict[str, Any], tmp_path: Path) -> None:
    """The check of a run compares with the model after its readers were fitted, and before its channels went."""
    rule = {
        "criterion": "reconstruction",
        "compensation": "least_squares",
        "start": 0,
        "end": 1,
        "target": {"macs": 0.6},
    }
    rules = [{**rule, **more}]
    found = run(tmp_path, epochs=2, dense_baseline=False, latency=None, onnx=None, pruning={"rules": rules})[
        "verification"
    ]
    assert found["masked_removed"] <= 1e-5 * found["scale"]
