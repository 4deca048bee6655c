"""Norms of checkpoints, where pruning could start, runs side by side."""

from __future__ import annotations

import copy
import csv
import io
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import report_fixture
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune
from typer.testing import CliRunner

from pruningawaretraining import Pruning, save_pruned
from pruningawaretraining.analysis import compare, compare_figures
from pruningawaretraining.analysis import gap_threshold as choice
from pruningawaretraining.analysis.checkpoints import epochs_of, find_checkpoints, read_weights
from pruningawaretraining.analysis.norms import NormReader, scan
from pruningawaretraining.analysis.sources import load_sources
from pruningawaretraining.analysis.sweep import SweepOptions, run_sweep
from pruningawaretraining.cli.main import app
from pruningawaretraining.config.schema import Rule
from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.experiment.models import DigitsResNet
from pruningawaretraining.experiment.record import EDGES
from pruningawaretraining.experiment.schema import load_experiment
from pruningawaretraining.report.run import Run

EXAMPLE = torch.randn(2, 1, 8, 8)
NAME = "pruningawaretraining.experiment.models:digits_resnet"


def small() -> nn.Module:
    torch.manual_seed(0)
    return DigitsResNet(widths=(8, 16), blocks=1)


def pruner_of(model: nn.Module) -> Pruning:
    return Pruning(model, {"rules": [{"target": {"sparsity": 0.4}, "start": 0, "end": 1}]}, example_inputs=EXAMPLE)


def build() -> tuple[nn.Module, Any]:
    return small(), EXAMPLE


# --- reading ----------------------------------------------------------------------------------------------------


def test_checkpoints_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        (tmp_path / f"epoch_{number}.pt").touch()
    (tmp_path / "notes.txt").touch()
    found = find_checkpoints(tmp_path)
    assert [path.name for path in found] == ["epoch_1.pt", "epoch_2.pt", "epoch_10.pt"]
    assert epochs_of(found) == [1, 2, 10] and epochs_of([Path("best.pt"), Path("last.pt")]) == [0, 1]
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoints(_empty(tmp_path))


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"state": {}}},
        lambda state: {"training": {"model": {f"module.{key}": value for key, value in state.items()}}},
    ],
)
def test_the_state_dict_in_a_file_is_found(tmp_path: Path, wrap: Any) -> None:
    state = small().state_dict()
    torch.save(wrap(state), tmp_path / "a.pt")
    found = read_weights(tmp_path / "a.pt")
    reader = NormReader(build)
    assert len(found) == len(state) and reader.read(found) == reader.read(state)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_text("nothing")
    torch.save({"loss": [1.0]}, tmp_path / "b.pt")
    for name, message in (("a.pt", "cannot be read"), ("b.pt", "holds no state dict")):
        with pytest.raises(CheckpointError, match=message):
            read_weights(tmp_path / name)
    torch.save({"other.weight": torch.zeros(3)}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"c.pt.*weights of the model are missing"):
        scan([tmp_path / "c.pt"], build)


def test_masks_of_torch_are_multiplied(tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Linear(2, 2, bias=False))
    prune.custom_from_mask(layer[0], "weight", torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    torch.save(layer.state_dict(), tmp_path / "a.pt")
    found = read_weights(tmp_path / "a.pt")
    assert list(found) == ["0.weight"] and torch.equal(found["0.weight"], layer[0].weight.detach())


def test_norms_are_those_of_the_pruner_dense_masked_and_removed(tmp_path: Path) -> None:
    """The histogram of a checkpoint is that of the pruner's own norms; removed groups are counted."""
    model = small()
    pruner = pruner_of(model)
    states = [copy.deepcopy(model.state_dict())]
    expected = [pruner.norms()]
    pruner.prune(model, 0)
    assert pruner.phase == "prune"
    states.append(copy.deepcopy(model.state_dict()))
    expected.append(pruner.norms())
    pruner.prune(model, 1)
    assert pruner.phase == "finetune"
    save_pruned(model, tmp_path / "2.safetensors")
    expected.append(pruner.norms())
    for number, state in enumerate(states):
        torch.save(state, tmp_path / f"{number}.pt")
    found = scan(find_checkpoints(tmp_path), build)["epochs"]
    for number, (moment, norms) in enumerate(zip(found, expected, strict=True)):
        assert moment["epoch"] == number and moment["sets"].keys() == norms.keys()
        for name, norms_G in norms.items():
            one = moment["sets"][name]
            assert one["size"] == len(norms_G) and one["zeros"] == int((norms_G == 0).sum())
            assert one["removed"] == len(expected[0][name]) - len(norms_G)
            alive = norms_G[norms_G > 0]
            for at, count in enumerate(one["counts"]):
                inside = (alive >= EDGES[at] * (1 - 1e-4)) & (alive < EDGES[at + 1] * (1 + 1e-4))
                assert count <= int(inside.sum()) and (count > 0 or at in (0, len(EDGES) - 2) or int(inside.sum()) < 2)
    assert sum(one["zeros"] for one in found[1]["sets"].values()) > 0
    assert sum(one["removed"] for one in found[2]["sets"].values()) > 0


def test_one_traced_model_serves_checkpoints_of_equal_shapes(tmp_path: Path) -> None:
    built = []

    def counted() -> tuple[nn.Module, Any]:
        built.append(1)
        return build()

    for number in range(4):
        save_file(small().state_dict(), tmp_path / f"{number}.safetensors")
    scan(find_checkpoints(tmp_path), counted)
    assert len(built) == 1


# --- choosing ---------------------------------------------------------------------------------------------------


def histogram_of(**bins: int) -> dict[str, Any]:
    """Counts by decade: ``m3=5`` is five groups at 10^-3."""
    counts = [0] * (len(EDGES) - 1)
    for name, count in bins.items():
        exponent = int(name[1:]) * (-1 if name[0] == "m" else 1)
        counts[next(at for at, edge in enumerate(EDGES) if edge >= 10**exponent * 0.999)] = count
    return {"counts": counts, "zeros": 0, "size": sum(counts)}


def history(shares: list[int], low: str = "m3", whole: int = 100) -> Run:
    """A run whose only set has so many groups near zero in each epoch, and the others at 1."""
    epochs = [
        {"epoch": number, "phase": "regularize", "sets": {"a": histogram_of(**{low: near, "p0": whole - near})}}
        for number, near in enumerate(shares)
    ]
    return Run({}, norms={"edges": list(EDGES), "epochs": epochs})


def test_the_epoch_is_where_the_mass_near_zero_has_settled() -> None:
    found = choice.choose(history([0, 5, 20, 39, 40, 40, 40]))
    assert (found.epoch, found.separated, found.settled, found.share) == (3, True, True, 0.39)
    assert 1e-3 < found.threshold < 0.35 and "waiting longer changes little" in found.reason


def test_a_heap_of_less_than_the_tolerance_has_to_be_there() -> None:
    found = choice.choose(history([0, 0, 40, 150, 190, 190], whole=10_000))
    assert (found.epoch, found.share) == (3, 0.015), "2% more or less do not matter, but all or nothing of a heap does"


def test_a_heap_that_still_grows_says_so() -> None:
    found = choice.choose(history([0, 5, 10, 20, 30]))
    assert (found.epoch, found.settled) == (4, False) and "still grows" in found.reason


def test_groups_on_their_way_are_said() -> None:
    run = history([40, 40])
    for moment in run.norms["epochs"]:
        moment["sets"]["a"] = histogram_of(m6=40, p0=60)
        moment["sets"]["a"]["counts"][48:92:2] = [1] * 16 + [0] + [1] * 5
    found = choice.choose(run)
    assert found.threshold < 1e-3 and "Another 13.2% are on their way there" in found.reason
    assert "on their way" not in choice.choose(history([40, 40])).reason


@pytest.mark.parametrize("shares", [[0, 0, 0], [0, 1, 1]])
def test_no_heap_no_gap(shares: list[int]) -> None:
    found = choice.choose(history(shares))
    assert not found.separated and found.epoch == 2 and "no gap" in found.reason
    assert choice.choose(Run({})).epoch is None


def test_the_threshold_lies_in_the_uppermost_gap() -> None:
    """Groups on their way to zero leave several gaps behind them."""
    found, _ = choice.gap(EDGES, {"a": histogram_of(m6=10, m3=10, m2=10, p0=100)})
    assert found is not None and 0.02 < found < 0.35


def test_layers_of_other_scale_are_no_heap() -> None:
    """A layer whose groups are all small is not near zero: norms are taken relative to their own layer."""
    sets = {"big": histogram_of(p1=50), "small": histogram_of(m2=50)}
    assert choice.gap(EDGES, sets)[0] is None
    assert choice.share(EDGES, sets, 0.1) == 0.0


def test_epochs_that_were_masked_do_not_count() -> None:
    run = history([0, 30, 30, 30])
    epochs = run.norms["epochs"]
    epochs[3]["sets"]["a"]["zeros"] = 30
    assert [moment["epoch"] for moment in choice.before_pruning(epochs)] == [0, 1, 2]
    epochs[2]["phase"] = epochs[3]["phase"] = "prune"
    assert [moment["epoch"] for moment in choice.before_pruning(epochs)] == [0, 1]


def test_a_removal_in_the_first_event_does_not_count_as_before_pruning() -> None:
    run = history([0, 30, 30, 30])
    run.norms["epochs"][3]["sets"]["a"] = histogram_of(p0=70)
    found = compare_figures.compared("a", run)
    assert [moment["epoch"] for moment in choice.before_pruning(found.run.norms["epochs"])] == [0, 1, 2]
    assert found.choice.separated and found.run.norms["epochs"][3]["sets"]["a"]["removed"] == 30


def test_zeros_and_removed_groups_are_near_zero() -> None:
    one = {**histogram_of(p0=6, m4=2), "zeros": 1, "removed": 1}
    assert choice.share(EDGES, {"a": one}, 0.01) == 0.4
    assert choice.share(EDGES, {"a": {"counts": [0] * (len(EDGES) - 1), "zeros": 5}}, 0.01) == 1.0


# --- side by side -----------------------------------------------------------------------------------------------


def test_comparison_has_every_run_and_its_numbers(tmp_path: Path) -> None:
    for name, strength in (("weak", 5e-4), ("strong", 5e-2)):
        config = {"pruning": {"rules": [{"regularizer": {"type": "growing_l2", "strength": strength}}]}}
        report_fixture.write_run(tmp_path / name, config=config)
    runs = load_sources([tmp_path / "weak", tmp_path / "strong"], page=tmp_path / "page.html")
    assert [(one.name, one.strength) for one in runs] == [("weak", 5e-4), ("strong", 5e-2)]
    paths = compare.write_comparison(runs, tmp_path / "page.html", "both")
    text = paths[0].read_text()
    assert "0.0005" in text and "0.05" in text and 'class="ridge' in text and "98.61%" in text
    found = json.loads(paths[1].read_text())
    assert [one["name"] for one in found] == ["weak", "strong"] and found[0]["accuracy"] == 0.9861
    rows = list(csv.DictReader(paths[2].open()))
    whole = [row for row in rows if row["set"] == "all" and row["run"] == "weak"]
    assert len(whole) == report_fixture.EPOCHS
    for row in whole:
        parts = [one for one in rows if (one["run"], one["epoch"]) == ("weak", row["epoch"]) and one["set"] != "all"]
        for key in ("groups", "near_zero", "zero"):
            assert int(row[key]) == sum(int(one[key]) for one in parts)


@pytest.mark.parametrize(("seed", "beside"), [(0, True), (1, False)])
def test_runs_that_are_trained_alike_have_one_dense_model(seed: int, beside: bool, tmp_path: Path) -> None:
    """As a sweep's: the first has trained it. Another seed gives another dense model."""
    alone = {"macs": 2, "parameters": 2}
    report_fixture.write_run(
        tmp_path / "other", dense=alone, config={"seed": seed, "name": "b", "dense_baseline": False}
    )
    report_fixture.write_run(tmp_path / "first", config={"seed": 0, "name": "a", "dense_baseline": True})
    other, first = load_sources([tmp_path / "other", tmp_path / "first"])
    assert first.run.summary["dense"]["accuracy"] == 0.9889
    assert other.run.summary["dense"] == (alone | {"accuracy": 0.9889} if beside else alone)


def test_advice_takes_the_accuracy_into_account() -> None:
    runs = []
    for name, near, accuracy in (("strong", 60, 0.80), ("middle", 40, 0.95), ("weak", 0, 0.96)):
        run = history([0, near, near, near])
        run = Run({"pruned": {"accuracy": accuracy}}, norms=run.norms)
        runs.append(compare_figures.compared(name, run))
    assert compare.advice(runs).startswith("middle: ")
    collapsed = compare.advice([runs[0], runs[2]])
    assert collapsed.startswith("weak: the strongest whose accuracy holds"), "an accuracy that is lost is no advice"
    other = compare_figures.compared("other", Run({"data": {"name": "cifar"}}, norms=runs[0].run.norms))
    assert compare.advice([*runs, other]) == "", "other data: nothing to choose between"
    assert compare.advice(runs[:1]) == "" and "In none" in compare.advice([runs[2], runs[2]])


def of_accuracy(name: str, near: int, accuracy: float, dense: float | None = None) -> compare_figures.Compared:
    summary = {"pruned": {"accuracy": accuracy}, "dense": {"accuracy": dense}}
    return compare_figures.compared(name, Run(summary, norms=history([0, near, near, near]).norms))


def test_an_accuracy_holds_against_the_dense_baseline() -> None:
    lost = compare.advice([of_accuracy("strong", 40, 0.134, 0.28), of_accuracy("weak", 0, 0.166, 0.28)])
    assert lost.startswith("Accuracy holds in none of them: strong is at 13.40%, 14.60 points below its dense model")
    assert "weak is at 16.60%, 11.40 points below" in lost
    found = compare.advice([of_accuracy("strong", 0, 0.2, 0.28), of_accuracy("weak", 0, 0.275, 0.28)])
    assert found.startswith("weak: the strongest whose accuracy holds")
    assert "27.50%, 0.50 points below its dense model" in found
    unknown = compare.advice([of_accuracy("strong", 0, 0.8), of_accuracy("weak", 0, 0.96)])
    assert "no dense model to compare with" in unknown


@pytest.mark.parametrize(
    ("weak", "strong", "direction"),
    [(0.2, 0.1, "Try a weaker regulariser, a m"), (0.1, 0.2, "Try a stronger regulariser, a m"), (0.1, 0.1, "Try a m")],
)
def test_what_to_try_follows_from_the_runs(weak: float, strong: float, direction: str) -> None:
    runs = [
        replace(of_accuracy(f"{strength}", 0, accuracy, 0.9), strength=strength)
        for strength, accuracy in ((1e-3, weak), (1e-1, strong))
    ]
    assert direction in compare.advice(runs)
    page = compare.page(runs, "two")
    assert all("regularise longer" not in one["reason"] for one in page["runs"]), "one advice, of all runs"


def test_a_single_checkpoint_says_nothing_of_time() -> None:
    run = history([40])
    run.norms["epochs"][0]["file"] = "best.pt"
    found = choice.choose(run)
    assert found.epoch is None and "in best.pt" in found.reason and "waiting" not in found.reason
    assert found.reason.count("40.0%") == 1
    alone = choice.choose(history([40]))
    assert alone.epoch == 0 and alone.reason.count("40.0%") == 1 and "waiting" not in alone.reason


def test_files_given_by_name_are_runs_of_their_own(tmp_path: Path) -> None:
    model = small()
    pruner = pruner_of(model)
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    for epoch in (0, 1):
        pruner.prune(model, epoch)
    save_pruned(model, tmp_path / "pruned.safetensors")
    files = [tmp_path / name for name in ("pruned.safetensors", "dense.safetensors")]
    runs = load_sources(files, f"{__name__}:small", (2, 1, 8, 8))
    assert [one.name for one in runs] == ["pruned.safetensors", "dense.safetensors"]
    assert all(len(one.run.norms["epochs"]) == 1 for one in runs)
    removed = [sum(row["removed"] for row in compare.rows_of(one) if row["set"] == "all") for one in runs]
    assert removed[0] > 0 and removed[1] == 0
    assert compare.advice(runs) == "", "files say nothing of which training was better"


@pytest.mark.parametrize("alone", [True, False])
def test_junk_is_one_line_that_names_the_file(tmp_path: Path, alone: bool) -> None:
    folder = tmp_path / "ckpt"
    folder.mkdir()
    torch.save(small().state_dict(), folder / "0.pt")
    (folder / "bad.pt").write_bytes(bytes((7 * number + 3) % 256 for number in range(300)))
    source = folder / "bad.pt" if alone else folder
    arguments = ["analyze", str(source), "--model", f"{__name__}:small", "--input-shape", "1,1,8,8"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "a.html")])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "bad.pt' cannot be read" in result.stderr and "weights_only" not in result.stderr


def test_any_junk_is_refused(tmp_path: Path) -> None:
    chosen, path = random.Random(0), tmp_path / "junk.pt"
    for number in range(300):
        path.write_bytes((b"", b"PK\x03\x04", b"\x80\x02")[number % 3] + chosen.randbytes(chosen.randint(0, 300)))
        with pytest.raises(CheckpointError, match="junk.pt"):
            read_weights(path)


@pytest.mark.parametrize("shape", [["--input-shape", "1,1,8,8"], []])
def test_a_checkpoint_of_another_network_is_said(tmp_path: Path, shape: list[str]) -> None:
    torch.save(small().state_dict(), tmp_path / "other.pt")
    result = CliRunner().invoke(app, ["analyze", str(tmp_path / "other.pt"), "--model", "resnet18", *shape])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "other.pt': it belongs to another network than ResNet" in result.stderr
    assert "'layer1.0.conv1.weight' for one (nearest: 'stages.1.0.conv1.weight')" in result.stderr
    assert "'conv1.weight' is 8x1x3x3 where the model has 64x3x7x7" in result.stderr


def test_a_wrong_shape_is_said_in_terms_of_the_command(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "0.pt")
    arguments = ["analyze", str(tmp_path / "0.pt"), "--model", f"{__name__}:small", "--input-shape", "1,3,8,8"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "rejects inputs of shape [(1, 3, 8, 8)]" in result.stderr
    assert "--input-shape" in result.stderr and "example_inputs" not in result.stderr


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("nowhere/a.html", "does not exist. Allowed: a file in an existing folder"),
        ("a.json", "does not end in .html"),
        ("a", "does not end in .html"),
    ],
)
def test_where_a_page_may_go(tmp_path: Path, out: str, message: str) -> None:
    folder = report_fixture.write_run(tmp_path / "run")
    result = CliRunner().invoke(app, ["analyze", str(folder), "--out", str(tmp_path / out)])
    assert result.exit_code == 2 and result.stderr.startswith("error: --out: ") and message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_page_of_one_run_lies_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, other = (report_fixture.write_run(tmp_path / name) for name in ("one", "other"))
    alone = CliRunner().invoke(app, ["analyze", "one"])
    assert alone.output.splitlines()[-1] == "wrote one/analysis.html, one/analysis.json, one/analysis.csv"
    both = CliRunner().invoke(app, ["analyze", str(one), str(other)])
    assert both.output.splitlines()[-1] == "wrote analysis.html, analysis.json, analysis.csv"
    assert (
        (one / "analysis.html").is_file() and Path("analysis.csv").is_file() and not (other / "analysis.html").exists()
    )


def test_axes_of_norms_have_at_least_two_decades() -> None:
    run = history([0, 0])  # all norms in one bin
    page = compare.page([compare_figures.compared("a", run)], "a")
    for side in page["sides"]:
        for figure in side["figures"]:
            assert len(re.findall(r'text-anchor="middle">([^<]+)<', figure.svg)) >= 2


def test_analyze_needs_a_model_for_checkpoints_and_reads_unfinished_runs(tmp_path: Path) -> None:
    folder = report_fixture.write_run(tmp_path / "run")
    (folder / "summary.json").unlink()
    result = CliRunner().invoke(app, ["analyze", str(folder), "--out", str(tmp_path / "a.html")])
    assert result.exit_code == 0, result.output
    assert "start after epoch" in result.output and (tmp_path / "a.csv").is_file()
    torch.save(small().state_dict(), tmp_path / "0.pt")
    refused = CliRunner().invoke(app, ["analyze", str(tmp_path / "0.pt")])
    assert refused.exit_code == 2 and "--model: missing" in refused.stderr
    missing = CliRunner().invoke(app, ["analyze", str(tmp_path / "nothing")])
    assert missing.exit_code == 2 and "there is no" in missing.stderr


def test_analyze_scans_a_folder_of_a_named_model(tmp_path: Path) -> None:
    from pruningawaretraining.experiment.models import digits_resnet

    (tmp_path / "ckpt").mkdir()
    for number in range(2):
        torch.save({"state_dict": digits_resnet().state_dict()}, tmp_path / "ckpt" / f"{number}.pth")
    arguments = ["analyze", str(tmp_path / "ckpt"), "--model", NAME, "--input-shape", "1,1,8,8"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "a.html")])
    assert result.exit_code == 0, result.output
    assert "ckpt" in result.output and "no gap" in result.output


def test_a_strength_is_put_into_every_regulariser() -> None:
    from pruningawaretraining.analysis.sweep import with_strength

    named = Rule(regularizer="growing_l2", target={"macs": 0.5})
    assert with_strength(named, 0.25).regularizer == {"type": "growing_l2", "strength": 0.25}
    full = Rule(regularizer={"type": "growing_l2", "alpha": 2.0, "strength": 1.0}, target={"macs": 0.5})
    assert with_strength(full, 0.25).regularizer == {"type": "growing_l2", "alpha": 2.0, "strength": 0.25}
    plain = Rule(target={"macs": 0.5})
    assert with_strength(plain, 0.25) is plain
    with pytest.raises(ConfigError, match="strength"):
        with_strength(named, -1.0)


def test_sweep_trains_the_baseline_once_and_compares(tmp_path: Path) -> None:
    from experiment_fixture import tiny

    config = load_experiment(tiny(epochs=3, latency=None, onnx=None))
    said = io.StringIO()
    runs, page = run_sweep(config, SweepOptions((1e-2, 1e-4), tmp_path / "sweep"), Console(file=said, width=80))
    for number, strength in ((1, "0.01"), (2, "0.0001")):
        assert f"run {number} of 2, strength {strength}: {tmp_path / 'sweep' / strength}" in said.getvalue()
    assert [one.name for one in runs] == ["0.01", "0.0001"] and [one.strength for one in runs] == [1e-2, 1e-4]
    dense = [{row["model"] for row in one.run.metrics} for one in runs]
    assert dense == [{"dense", "pruned"}, {"pruned"}]
    accuracies = [compare.reached(one.run)["dense_accuracy"] for one in runs]
    assert accuracies[0] is not None and accuracies[0] == accuracies[1]
    assert 'href="0.01/report.html"' in page.read_text()
    again, _ = run_sweep(config, SweepOptions((1e-2, 1e-4), tmp_path / "sweep", resume=True))
    assert [one.choice for one in again] == [one.choice for one in runs]
    with pytest.raises(ConfigError, match="holds a finished run"):
        run_sweep(config, SweepOptions((1e-2,), tmp_path / "sweep"))
    with pytest.raises(ConfigError, match="twice"):
        run_sweep(config, SweepOptions((1e-2, 1e-2), tmp_path / "sweep"))
    bare = load_experiment(tiny(pruning={"rules": [{"target": {"macs": 0.6}}]}))
    with pytest.raises(ConfigError, match="none has a regularizer"):
        run_sweep(bare, SweepOptions((1e-2,), tmp_path / "other"))


@pytest.mark.slow
def test_thirty_checkpoints_of_a_resnet50_take_less_than_a_minute(tmp_path: Path) -> None:
    import time

    from torchvision.models import resnet50

    torch.save(resnet50().state_dict(), tmp_path / "0.pth")
    for number in range(1, 30):
        (tmp_path / f"{number}.pth").hardlink_to(tmp_path / "0.pth")
    started = time.perf_counter()
    (found,) = load_sources([tmp_path], "torchvision:resnet50", (1, 3, 224, 224))
    assert len(found.run.norms["epochs"]) == 30
    assert time.perf_counter() - started < 60
