"""What the terminal shows at 80 columns: no name is broken but after a dot, nothing is wider, flags take no value."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from pruningawaretraining import Pruning, load_config
from pruningawaretraining.cli.common import OF_REST, reported
from pruningawaretraining.cli.main import app
from pruningawaretraining.experiment.inspection import Inspected
from pruningawaretraining.experiment.model_tree import tree_view
from pruningawaretraining.report.summary import Report, render, wrapped_name

LONG = "encoder.layers.encoder_layer_11.self_attention.out_proj"
HALF = {"rules": [{"target": {"macs": 0.5}}]}
SOME = {"rules": [{"target": {"sparsity": 0.25}}]}


def pat(*arguments: str) -> str:
    found = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80", "TERM": "dumb"})
    assert found.exit_code == 0, found.output
    return found.output


def deep(width: int = 1024) -> nn.Sequential:
    """A network whose layers have long names and large widths."""
    inner: nn.Module = nn.Linear(width, width)
    for part in reversed(LONG.split(".")):
        inner = nn.Sequential(OrderedDict({part: inner}))
    return nn.Sequential(OrderedDict(stem=nn.Linear(8, width), body=inner, act=nn.ReLU(), head=nn.Linear(width, 10)))


@pytest.mark.parametrize(
    ("name", "width", "lines"),
    [
        ("conv1", 10, ["conv1"]),
        ("layer2.0.downsample.0", 21, ["layer2.0.downsample.0"]),
        ("layer2.0.downsample.0", 20, ["layer2.0.downsample.", "0"]),
        ("layer2.0.downsample.0", 12, ["layer2.0.", "downsample.0"]),
        ("a_name_without_dots", 8, ["a_name_without_dots"]),
    ],
)
def test_names_break_after_dots(name: str, width: int, lines: list[str]) -> None:
    assert wrapped_name(name, width).split("\n") == lines


def test_a_report_fits_80_columns_with_whole_names() -> None:
    pruner = Pruning(deep(), HALF, example_inputs=torch.zeros(1, 8))
    text = str(pruner.report())
    assert max(map(len, text.splitlines())) <= 80
    names = "".join(line.split("  ")[0].strip() for line in text.splitlines()[4:])
    assert f"body.{LONG}" in names
    wide = render(pruner.report(), 160)
    assert f"body.{LONG}" in wide and "type" in wide and "kept" in wide


def test_macs_of_a_batch_are_called_so() -> None:
    one, four = (str(Pruning(deep(8), HALF, example_inputs=torch.zeros(size, 8)).report()) for size in (1, 4))
    assert "of a batch of 4" in four and "batch" not in one
    assert "batch" not in str(Report("prune", 0.0, {"dense": 2, "kept": 1}, {}))


def test_inspect_shows_a_tree_with_widths_sets_and_what_stays() -> None:
    text = pat("inspect", "pruningawaretraining.experiment.models:digits_resnet", "--input-shape", "1,1,8,8")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "696k parameters" in lines[0] and "6.57M MACs for an input of 1x1x8x8" in text.replace("\n", " ")
    rows = {match[1]: line.split() for line in lines if (match := re.match(r"[ │├└─]*([\w.]+)  ", line))}
    assert re.search(r"^ conv1 +1 +32 +1 ", text, flags=re.MULTILINE)
    shares = [float(one[:-1]) for line in lines for one in line.split() if re.fullmatch(r"[\d.]+%", one)]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert rows["linear"][3] == "stays" and "reaches an output of the model: linear" in text
    assert "├─ " in text and "└─ " in text and "****" not in text
    first = [line for line in lines if re.search(r"conv2 +32 +32 +1 ", line)]
    assert len(first) == 2  # both blocks of the first stage end in the stream that conv1 begins


class Attends(nn.Module):
    """An attention, which computes more than the layers in it."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.read = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.attend(x, x, x, need_weights=False)[0].mean(1))


def mixed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), Attends())


def test_inspect_counts_what_an_attention_computes_itself_and_warns_of_nothing_that_it_lists() -> None:
    model = Inspected(mixed(), torch.zeros(1, 5, 8), load_config(SOME))
    shares = re.findall(r"([\d.]+)%", render(tree_view(model, 80), 80))
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.5), "all MACs are in the table"
    assert "keep all their channels" not in pat("inspect", "test_terminal:mixed", "--input-shape", "1,5,8")


def test_a_command_says_once_what_stays(caplog: pytest.LogCaptureFixture) -> None:
    for lists_rest, times in ((False, 1), (True, 0), (False, 1)):
        caplog.clear()
        with reported(debug=False, lists_rest=lists_rest):
            for _ in range(2):
                Pruning(mixed(), SOME, example_inputs=torch.zeros(1, 5, 8))
        assert caplog.text.count("keep all their channels") == times
    assert not any(handler.filters for handler in logging.getLogger().handlers)
    assert logging.getLogger(OF_REST).level == logging.NOTSET


def test_inspect_says_what_a_batch_is() -> None:
    text = pat("inspect", "pruningawaretraining.experiment.models:digits_resnet", "--input-shape", "4,1,8,8")
    assert "26.3M MACs for a batch of 4x1x8x8" in text.replace("\n", " ")


def test_long_names_stay_whole_in_inspect() -> None:
    text = pat("inspect", "test_terminal:deep", "--input-shape", "1,8")
    first = next(at for at, line in enumerate(text.splitlines()) if "body" in line)
    found = "".join(re.split("  +", line.strip())[0] for line in text.splitlines()[first : first + 4])
    assert f"body.{LONG}" in found


def test_latency_says_that_it_counts_a_batch() -> None:
    source = ("pruningawaretraining.experiment.models:digits_resnet", "--input-shape", "1,1,8,8")
    shown = pat("latency", *source, "--runtime", "torch", "--repeats", "1", "--batch", "4")
    assert "MACs/batch" in shown and "26.3M" in shown
    assert "MACs/batch" not in pat("latency", *source, "--runtime", "torch", "--repeats", "1")


@pytest.mark.parametrize("command", ["", "run", "demo", "oneshot", "inspect", "latency", "analyze", "sweep", "check"])
def test_flags_are_not_shown_with_a_value(command: str) -> None:
    text = pat(*command.split(), "--help")
    assert not re.search(r"<bool>|BOOLEAN", text) and "--help" in text
