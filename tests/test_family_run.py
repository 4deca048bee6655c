"""``pat run`` with a family: files, lines and page of every member; killed and resumed it ends the same."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from experiment_fixture import tiny
from rich.console import Console
from safetensors.torch import load_file

from pruningawaretraining import count_macs, load_pruned
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.experiment import finish, record
from pruningawaretraining.experiment.run import run_experiment
from pruningawaretraining.experiment.runner import Runner
from pruningawaretraining.experiment.schema import load_experiment
from pruningawaretraining.report.family import family_table, figures, rows, setting_text
from pruningawaretraining.report.html import render_report
from pruningawaretraining.report.run import Run, load_run
from pruningawaretraining.runtimes.timing import Latency, LatencyComparison

NAMES = ["0.75", "0.55"]
RULE = {"start": 0, "end": 3, "hold": 2, "target": {"macs": [0.75, 0.55]}}
CONFIG = Path(__file__).parents[1] / "configs" / "family.yaml"


def family(**changes: Any) -> dict[str, Any]:
    return tiny(**{"dense_baseline": False, "epochs": 6, "pruning": {"rules": [RULE]}, **changes})


def run(folder: Path, **options: Any) -> dict[str, Any]:
    return run_experiment(load_experiment(family(out=str(folder))), **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    (folder / "pruned-0.99.safetensors").write_text("of an earlier run")
    (folder / "pruned-mine.safetensors").write_text("somebody's own")
    run(folder, overwrite=True)
    return folder


def test_each_member_has_its_files_and_its_line(finished: Path) -> None:
    config, summary = load_experiment(family()), json.loads((finished / record.SUMMARY).read_text())
    assert [one["name"] for one in summary["family"]] == NAMES
    assert [one["epoch"] for one in summary["family"]] == [3, 5]
    metrics = [json.loads(line) for line in (finished / record.METRICS).read_text().splitlines()]
    assert summary["family"][1]["accuracy"] == metrics[-1]["accuracy"]
    for one in summary["family"]:
        stage = Runner(config, *_data(config)).new_model()
        loaded = load_pruned(stage, finished / one["file"])
        macs = count_macs(loaded, torch.zeros(1, *summary["data"]["shape"]))
        assert one["macs"] == macs <= one["target"]["macs"] * summary["dense"]["macs"]
        assert one["bytes"] == (finished / one["file"]).stat().st_size
        assert one["latency_ms"] > 0 and one["onnx_difference"] < 1e-4
        assert {one["file"], one["onnx"]} <= set(summary["files"])
    assert not (finished / "pruned-0.99.safetensors").exists()
    assert (finished / "pruned-mine.safetensors").exists()
    assert summary["target"]["macs"] == 0.55
    same, last = load_file(finished / record.PRUNED), load_file(finished / summary["family"][1]["file"])
    assert same.keys() == last.keys() and all(torch.equal(same[key], last[key]) for key in same)


def _data(config: Any) -> Any:
    from pruningawaretraining.experiment.datasets import load_data
    from pruningawaretraining.experiment.display import Display

    return load_data(config.data), torch.device("cpu"), Display()


def test_the_page_shows_the_family_beside_the_dense_model(finished: Path) -> None:
    page = (finished / record.REPORT).read_text()
    section = page[page.index('<section id="family">') : page.index('<section id="training">')]
    assert section.count("<svg") >= 2
    for text in ("dense", *NAMES, "pruned-0.75.safetensors, model-0.75.onnx", "Accuracy against MACs"):
        assert text in section, text
    assert json.loads((finished / "report.json").read_text())["family"][0]["name"] == "0.75"


def test_a_page_without_a_family_has_no_section(finished: Path) -> None:
    known = load_run(finished)
    summary = {key: value for key, value in known.summary.items() if key != "family"}
    assert 'id="family"' not in render_report(Run(summary, known.metrics, known.norms, known.config))


def test_costs_are_shown_with_their_share_of_the_dense_model() -> None:
    dense = {"accuracy": 0.9, "macs": 200, "bytes": 1000, "latency_ms": None}
    summary = {"dense": dense, "family": [{"name": "0.50", "accuracy": 0.8, "macs": 100, "bytes": 600, "file": "a"}]}
    assert [row["macs"] for row in rows(summary)] == ["200", "100 (50.0%)"]
    assert [row["latency_ms"] for row in rows(summary)] == ["–", "–"]
    assert [figure.title for figure in figures(summary)] == ["Accuracy against MACs", "Accuracy against size"]
    assert rows({"dense": dense}) == [] and figures({"dense": dense}) == []


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ({"macs": [0.75, 0.55]}, {"runtime": "torch", "batch": 4, "threads": 1}),
        ({"latency": [0.7, 0.5], "batch": 16}, {"runtime": "onnxruntime", "batch": 16, "threads": 1}),
        ({"latency_ms": [8, 5], "runtime": "eager", "threads": 2}, {"runtime": "torch", "batch": 1, "threads": 2}),
        ({"latency": [0.7, 0.5], "batch": None}, {"runtime": "onnxruntime", "batch": 4, "threads": 1}),
    ],
)
def test_members_are_measured_where_their_latency_was_promised(
    target: dict[str, Any], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = {**RULE, "target": target}
    config = load_experiment(family(pruning={"rules": [rule]}, latency={"runtime": "torch", "batch": 4}))
    asked: list[Any] = []

    def compared(models: Any, runtime: Any, threads: int, *_: Any) -> LatencyComparison:
        asked.append((list(models), {len(images) for _, images in models.values()}, runtime["type"], threads))
        latencies = {name: Latency(2.0 - n, 1.0, 3.0, 5, "torch", 1) for n, name in enumerate(models)}
        return LatencyComparison(latencies, {"dense": 1.0, "0.70": 0.52}, {"dense": (1.0, 1.0), "0.70": (0.51, 0.53)})

    monkeypatch.setattr(finish, "compare_latency", compared)
    trained: Any = SimpleNamespace(
        config=config, device=torch.device("cpu"), fresh_model=lambda: None, images=lambda count: torch.zeros(count, 1)
    )
    found = finish._family_latencies(trained, {"0.70": torch.nn.Identity()})
    assert asked == [(["dense", "0.70"], {expected["batch"]}, expected["runtime"], expected["threads"])]
    assert found["0.70"] == {
        "latency_ms": 1.0, "dense_latency_ms": 2.0, "ratio": 0.52, "interval": [0.51, 0.53], "measured_on": expected
    }  # fmt: skip


def test_what_was_promised_stands_beside_what_was_measured() -> None:
    """The dense model's time on the page is that of the same turns, and a ratio is the one of its interval."""
    dense = {"accuracy": 0.9, "macs": 200, "bytes": 1000, "latency_ms": 0.1}
    timed: dict[str, Any] = {"latency_ms": 0.8, "dense_latency_ms": 1.2, "ratio": 0.701, "interval": [0.698, 0.706]}
    timed["measured_on"] = {"runtime": "onnxruntime", "batch": 16, "threads": 1}
    costs = {"accuracy": 0.8, "macs": 100, "bytes": 600, "file": "a"}
    summary = {"dense": dense, "family": [{"name": "0.70", "target": {"latency": 0.7}, **costs, **timed}]}
    first, member = rows(summary)
    assert (first["latency_ms"], first["promised"], first["interval"]) == ("1.2 ms", "–", "–")
    assert (member["latency_ms"], member["interval"]) == ("0.8 ms (70.1%)", "69.8 to 70.6%")
    assert member["promised"] == "70.0%" and setting_text(summary) == "latency: onnxruntime, batch 16, 1 thread"
    written = io.StringIO()
    Console(width=80, file=written).print(family_table(summary))
    title = "family (latency: onnxruntime, batch 16, 1 thread)"
    assert all(part in written.getvalue() for part in (title, "dense", "0.8 ms (70.1%)", "69.8 to 70.6%", "70.0%"))
    timeless = {"dense": dense, "family": [{"name": "0.70", "target": {"macs": 0.7}, **costs}]}
    assert setting_text(timeless) == "" and rows(timeless)[1]["promised"] == "–"


class Killed(BaseException):
    """The end of a process."""


@pytest.mark.parametrize("epochs_before", [1, 3, 4, 6])
@pytest.mark.parametrize("where", ["before", "after"])
def test_resumed_equals_uninterrupted(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs_before: int, where: str
) -> None:
    """Law 5, killed around the checkpoint in a hold, when a member is finished, and on the way to the next."""
    whole, calls = Runner._save, 0

    def save(self: Runner, stage: Any, *more: Any) -> None:
        nonlocal calls
        calls += stage is not None
        if where == "after":
            whole(self, stage, *more)
        if stage is not None and calls == epochs_before:
            raise Killed
        if where == "before":
            whole(self, stage, *more)

    monkeypatch.setattr(Runner, "_save", save)
    with pytest.raises(Killed):
        run(tmp_path)
    monkeypatch.undo()
    torch.manual_seed(123)
    summary = run(tmp_path, resume=True)
    for name in (record.PRUNED, *(f"pruned-{name}.safetensors" for name in NAMES)):
        expected, found = load_file(finished / name), load_file(tmp_path / name)
        assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    before = json.loads((finished / record.SUMMARY).read_text())["family"]
    times = ("latency_ms", "dense_latency_ms", "ratio", "interval")
    timeless = [[{**row, **dict.fromkeys(times, 0)} for row in one] for one in (before, summary["family"])]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"epochs": 5},
            r"epochs: 5 are too few for pruning.rules\[0\]: its last member is due in epoch 3, and hold is 2",
        ),
        ({"epochs": 4, "prune_at": "begin"}, r"epochs: 4 are too few .* Allowed: 5 or more"),
    ],
)
def test_a_family_longer_than_the_epochs_allow_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_experiment(family(**changes))
    assert "\n" not in str(caught.value)
    assert load_experiment(family(epochs=5, prune_at="begin")).epochs == 5


def test_the_shipped_example_is_a_family_that_fits() -> None:
    config = load_experiment(CONFIG)
    (rule,) = config.pruning.rules
    assert rule.target.names == ["0.70", "0.50", "0.33"]
    assert rule.span.bounds()[-1][1] + rule.hold == config.epochs  # the last one is fine-tuned as long as the others
