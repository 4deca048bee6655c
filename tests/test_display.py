"""What a run shows while it works, and where it logs."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from experiment_fixture import tiny
from rich.console import Console
from typer.testing import CliRunner

from pruningawaretraining.cli.main import app
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.experiment.display import Display, Pace, epoch_text, short_text, time_left
from pruningawaretraining.experiment.tracking import each_of, on_board


def row(epoch: int, seconds: float = 2.0, **changes: Any) -> dict[str, Any]:
    found = {"model": "pruned", "epoch": epoch, "phase": "prune", "loss": 0.3, "accuracy": 0.951, "macs": 0.62}
    return {**found, "seconds": seconds, **changes}


def shown(terminal: bool, width: int = 80) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=width, color_system=None, legacy_windows=False)
    with Display(console).stage("pruned small", 4, 1, 3) as stage:
        for _ in range(3):
            stage.tick()
        stage.epoch(row(1))
    return text.getvalue()


def test_plain_lines_say_everything_and_the_time_that_is_left() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines[0] == "pruned small" and len(lines) == 2
    for part in ("epoch   1/3", "prune", "95.10%", "MACs 62.0%", "2.0 s, 0:04 left"):
        assert part in lines[1]
    assert "\x1b" not in lines[1]


def test_a_terminal_gets_one_line_that_fits() -> None:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(terminal=True))
    last = [line for line in re.split(r"[\r\n]+", text) if line.strip()][-1]
    for part in ("epoch 2/3", "50%", "prune", "95.10%", "MACs 62.0%"):
        assert part in last
    assert len(last) <= 80


def test_zeros_are_shown_where_no_channel_goes() -> None:
    zeros = row(1, macs=1.0, sparsity=0.5)
    assert "MACs 100.0%  sparsity 50.0%" in epoch_text(zeros) and "sparsity 50.0%" in short_text(zeros)
    assert "sparsity" not in epoch_text(row(1, model="dense", sparsity=0.0))
    assert "MACs 62.0%" in short_text(row(1, sparsity=0.4))


def test_the_pace_follows_the_last_epochs() -> None:
    pace = Pace(10)
    assert pace.left(row(0, 10.0)) == 90.0
    for epoch in range(1, 6):
        left = pace.left(row(epoch, 1.0))
    assert left == 4.0, "slow first epochs are forgotten"
    assert [time_left(value) for value in (0, 59.6, 93.1, 3725)] == ["0:00", "1:00", "1:33", "1:02:05"]


def test_tensorboard_has_every_number_of_both_models(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tmp_path / "e.yaml"
    config.write_text(yaml.safe_dump(tiny(epochs=3, latency=None, onnx=None)))
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["run", str(config), "--out", str(out), "--tensorboard"])
    assert result.exit_code == 0, result.output
    found = accumulator.EventAccumulator(str(out / "tensorboard"))
    found.Reload()
    tags = set(found.Tags()["scalars"])
    assert {"accuracy/dense", "accuracy/pruned", "macs/pruned", "lr/dense", "loss/pruned"} <= tags
    assert [event.step for event in found.Scalars("accuracy/pruned")] == [0, 1, 2]


def test_stale_events_go_unless_the_run_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    stale = tmp_path / "events.out.tfevents.1"
    for resume in (True, False):
        stale.touch()
        with on_board(tmp_path, resume=resume) as watch:
            watch(row(0))
        assert stale.exists() == resume


def test_a_run_that_is_refused_leaves_its_events_alone(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "summary.json").write_text("{}")
    events = tmp_path / "tensorboard" / "events.out.tfevents.1"
    events.parent.mkdir()
    events.touch()
    config = tmp_path / "e.yaml"
    config.write_text(yaml.safe_dump(tiny()))
    result = CliRunner().invoke(app, ["run", str(config), "--out", str(tmp_path), "--tensorboard"])
    assert result.exit_code == 2 and "holds a finished run" in result.stderr and events.exists()


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"--tensorboard: it is not installed.*\[tensorboard\]"), on_board(tmp_path):
        pass


def test_rows_go_to_each() -> None:
    left: list[Any] = []
    right: list[Any] = []
    each_of(left.append, right.append)({"epoch": 1})
    assert left == right == [{"epoch": 1}]
