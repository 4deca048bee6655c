"""The folder of a finished run stands by itself: its config runs again from anywhere, and its models need no data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from experiment_fixture import tiny
from typer.testing import CliRunner, Result

from pruningawaretraining.cli.main import app

SHORT = {"epochs": 1, "latency": None, "onnx": None, "dense_baseline": False}


def pat(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "160"})


def images(path: Path) -> Path:
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=rng.integers(0, 255, (64, 8, 8), dtype=np.uint8), labels=np.arange(64) % 10)
    return path


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose config names data, weights and caps beside it, run from the project's folder."""
    folder = tmp_path_factory.mktemp("project")
    images(folder / "exp" / "img" / "a.npz")
    rules = [{"start": 0, "target": {"macs": 0.8}, "max_sparsity_from": "caps.json"}]
    (folder / "exp" / "caps.json").write_text(json.dumps({"conv1": 0.5}))
    data = {"name": "npz", "root": "img", "train_fraction": 1.0}
    config = {**tiny(pruning={"rules": rules}, **SHORT), "data": data, "batch_size": 16}
    (folder / "exp" / "a.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = pat("run", "exp/a.yaml", "--out", "exp/run")
    assert result.exit_code == 0, result.output
    return folder


def test_paths_of_a_resolved_config_are_absolute(project: Path) -> None:
    for found in (
        yaml.safe_load((project / "exp/run/config.yaml").read_text()),
        json.loads((project / "exp/run/summary.json").read_text())["config"],
    ):
        assert found["data"]["root"] == str(project / "exp/img")
        assert found["pruning"]["rules"][0]["max_sparsity_from"] == {"conv1": 0.5}


def test_a_resolved_config_runs_again_from_anywhere(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = pat("run", project / "exp/run/config.yaml", "--out", "again")
    assert result.exit_code == 0, result.output


def test_data_of_the_command_line_is_written_down_absolute(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project / "exp")
    result = pat("run", "a.yaml", "--data", "img/a.npz", "--out", "other", "--overwrite")
    assert result.exit_code == 0, result.output
    found = yaml.safe_load((project / "exp/other/config.yaml").read_text())
    assert found["data"]["root"] == str(project / "exp/img/a.npz")


def test_latency_of_a_finished_run_needs_no_data(project: Path, tmp_path: Path) -> None:
    """The summary says how many classes there are, and how large an image is."""
    run = tmp_path / "run"
    shutil.copytree(project / "exp/run", run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["root"] = str(tmp_path / "gone")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    result = pat("latency", run, "--trust", "--runtime", "torch", "--repeats", "2")
    assert result.exit_code == 0, result.output
    assert "run (pruned)" in result.output


@pytest.mark.parametrize("command", [("latency", "--runtime", "torch", "--repeats", "2"), ("inspect",)])
def test_commands_that_look_at_a_model_take_other_data(
    command: tuple[str, ...], project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = yaml.safe_load((project / "exp/a.yaml").read_text())
    config["pruning"]["rules"][0]["max_sparsity_from"] = str(project / "exp/caps.json")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(config))
    without = pat(command[0], tmp_path / "a.yaml", *command[1:])
    assert without.exit_code == 2 and "data.root: there is no" in without.output
    found = pat(command[0], tmp_path / "a.yaml", *command[1:], "--data", project / "exp/img")
    assert found.exit_code == 0, found.output
