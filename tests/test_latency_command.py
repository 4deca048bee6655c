"""``pat latency``: what it compares, counts and draws; how fast this machine is, is not tested."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from pruningawaretraining import Pruning, count_macs, export_onnx, save_pruned
from pruningawaretraining.cli.main import app
from pruningawaretraining.experiment import timing
from pruningawaretraining.experiment.models import digits_resnet
from pruningawaretraining.experiment.timing import Candidate, Timed, weight_bytes
from pruningawaretraining.experiment.timing_plot import draw_timing
from pruningawaretraining.experiment.timing_tables import noise_text, timing_tables
from pruningawaretraining.report.summary import si

MODEL = "pruningawaretraining.experiment.models:digits_resnet"
SHAPE = ["--input-shape", "1,1,8,8", "--repeats", "3"]
IMAGES = torch.zeros(1, 1, 8, 8)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = digits_resnet()
    Pruning(model, {"rules": [{"target": {"macs": 0.5}}]}, example_inputs=IMAGES).prune(model, 0)
    export_onnx(model, IMAGES, tmp_path / "pruned.onnx", exporter="torchscript")
    return save_pruned(model, tmp_path / "pruned.safetensors")


def run(*arguments: str) -> str:
    found = CliRunner().invoke(app, ["latency", *arguments], env={"COLUMNS": "160"})
    assert found.exit_code == 0, found.output
    return found.output


def test_dense_beside_pruned(checkpoint: Path, tmp_path: Path) -> None:
    onnx = str(checkpoint.with_suffix(".onnx"))
    text = run(str(checkpoint), onnx, "--model", MODEL, *SHAPE, "--batch", "2", "--out", str(tmp_path / "rows.json"))
    assert text.splitlines()[-1] == f"wrote {tmp_path / 'rows.json'}"
    assert "onnxruntime, batch 2, 1 thread" in text and "(dense)" in text
    rows = json.loads((tmp_path / "rows.json").read_text())["models"]
    dense, pruned, file = rows
    assert dense["ratio"] == 1.0 and pruned["low"] <= pruned["ratio"] <= pruned["high"]  # the median over the turns
    assert 0.3 < pruned["ratio"] / (pruned["median_ms"] / dense["median_ms"]) < 3
    model = digits_resnet()
    assert dense["macs"] == 2 * count_macs(model, IMAGES) and pruned["macs"] <= 0.5 * dense["macs"]
    assert dense["bytes"] == weight_bytes(model) and pruned["bytes"] == checkpoint.stat().st_size
    assert pruned["peak_bytes"] <= dense["peak_bytes"] and pruned["parameters"] < dense["parameters"]
    assert file["macs"] is None and file["bytes"] == Path(onnx).stat().st_size


def test_other_runtimes_and_models_by_name() -> None:
    assert "torch, batch 1" in run("demo", "--runtime", "torch", "--repeats", "3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.safetensors", *SHAPE], "--model: needed"),
        (["file.onnx"], "--input-shape: needed for 'file.onnx'"),
        ([MODEL, MODEL, *SHAPE], "is given twice"),
        ([MODEL, *SHAPE, "--runtime", "onnxruntim"], "did you mean 'onnxruntime'"),
        ([MODEL, *SHAPE, "--plot", "p.svg"], "--plot: no accuracy is known"),
        ([MODEL, *SHAPE, "--plot", "p.png"], "--plot: 'p.png' does not end in .svg. Allowed: 'p.svg'"),
        (["."], "holds no summary.json"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, ["latency", *arguments], env={"COLUMNS": "300"})
    assert found.exit_code == 2 and message in found.output


@pytest.mark.parametrize("name", ["resnet18", "runs/a/very/long/path/of/a/checkpoint/that/is/pruned.safetensors"])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_milliseconds_are_there_at_every_width(name: str, width: int) -> None:
    rows = [Timed(f"{name}{n}", "r", 2.01 - n, 1.51, 3.01, 1 - n / 4, 10**9, 10**7, 10**6, 10**5, 0.91) for n in (0, 1)]
    console = Console(width=width, file=io.StringIO())
    for table in timing_tables(rows, "onnxruntime", width):
        console.print(table)
    text = console.file.getvalue()
    assert "…" not in text and all(len(line) <= width for line in text.splitlines())
    for wanted in ("2.01", "1.01", "1.51 to 3.01", "0.750", si(10**9), si(10**7), si(10**6, "B"), "91.00%"):
        assert wanted in text
    assert len(timing_tables(rows, "", width)) == (1 if width == 200 else 2)


def test_names_break_at_no_width_that_one_table_or_two_fit() -> None:
    rows = [
        Timed(f"0.002 ({n})", "r", 10.2, 1.99, 14.5, 1, 10**8, 10**6, 10**6, 10**6, 0.99) for n in ("dense", "pruned")
    ]
    for width in range(80, 160):
        console = Console(width=width, file=io.StringIO())
        for table in timing_tables(rows, "onnxruntime", width, batch=16):
            console.print(table)
        text = console.file.getvalue()
        assert "0.002 (dense) " in text and "0.002 (pruned) " in text and " model " in f" {text}", width


def test_a_picture_of_a_family(tmp_path: Path) -> None:
    rows = [Timed(f"r{n}", "r", 2.0 - n, 1, 3, 1 - n / 4, 5, 5, 5, 5, 0.9 - n / 500) for n in range(2)]
    draw_timing(rows, tmp_path / "p.svg", "title")
    text = (tmp_path / "p.svg").read_text()
    at = [(float(x), float(y)) for x, y in re.findall(r'class="dot r-0" cx="([\d.]+)" cy="([\d.]+)"', text)]
    assert text.startswith("<svg xmlns") and 'class="line' not in text
    assert re.findall(r'class="note" [^>]*>([^<]+)</text>', text)[-2:] == ["r1", "r0"]
    (fast, low), (slow, high) = at
    assert fast < slow and 0 < low - high < 20, "0.2 points do not fill the axis"


def test_models_of_one_name_are_told_apart_by_what_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    inputs = torch.zeros(1, 1, 8, 8)
    runs = [Candidate(f"demo ({kind})", "runs/demo", digits_resnet(), inputs, 1) for kind in ("dense", "pruned")]
    monkeypatch.setattr(timing, "_of_run", lambda *_: runs)
    found = timing.candidates(["demo", "runs/demo"])
    assert [one.name for one in found] == ["demo (dense)", "runs/demo (dense)", "demo (pruned)"]


@pytest.mark.parametrize(
    ("p90", "high", "said"),
    [(1.1, 0.61, ""), (17.0, 0.61, "times of a spread by 1600% of their median"), (1.1, 0.9, "The machine is noisy")],
)
def test_a_noisy_timing_is_said(p90: float, high: float, said: str) -> None:
    dense = Timed("a", "a", 1.0, 1.0, p90, 1.0, None, None, None, 1, None)
    pruned = Timed("b", "a", 0.6, 0.6, 0.61, 0.6, None, None, None, 1, None, 0.59, high)
    assert (said in noise_text([dense, pruned])) and bool(said) == bool(noise_text([dense, pruned]))
