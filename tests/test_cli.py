"""The command line: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from experiment_fixture import tiny
from typer.testing import CliRunner, Result

from pruningawaretraining import __version__
from pruningawaretraining.cli.main import app
from pruningawaretraining.config import json_schema
from pruningawaretraining.experiment.schema import experiment_schema, load_experiment
from pruningawaretraining.experiment.shipped import shipped_configs

ROOT = Path(__file__).parents[1]


def pat(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(tiny(**changes)))
    return path


def test_version() -> None:
    assert pat("--version").output == f"pat {__version__}\n"
    command = [sys.executable, "-m", "pruningawaretraining", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"pat {__version__}\n"


def test_a_run_ends_with_a_table_and_is_not_overwritten(tmp_path: Path) -> None:
    config, out = written(tmp_path, epochs=3), tmp_path / "out"
    result = pat("run", config, "--out", out)
    assert result.exit_code == 0, result.output
    for text in ("Accuracy", "MACs", "Parameters", "File size", "Latency", "masked = removed", "= ONNX"):
        assert text in result.output
    assert f"wrote {out / 'report.html'}\nbeside it " in result.output
    assert all(path.name in result.output for path in out.iterdir() if path.suffix not in (".pt", ".lock"))
    assert len(re.findall(r"epoch +\d/2", result.output)) == 6
    again = pat("run", config, "--out", out)
    assert (again.exit_code, again.stderr.count("\n")) == (2, 1)
    assert again.stderr.startswith("error: out: ") and "holds a finished run" in again.stderr
    before = (out / "summary.json").stat().st_mtime_ns
    resumed = pat("run", config, "--out", out, "--resume")
    assert resumed.exit_code == 0 and "is finished" in resumed.output
    assert (out / "summary.json").stat().st_mtime_ns == before
    assert pat("run", config, "--out", out, "--overwrite").exit_code == 0
    assert (out / "summary.json").stat().st_mtime_ns != before


def test_a_missed_target_is_said(tmp_path: Path) -> None:
    rules = [{"start": 0, "end": 90, "target": {"macs": 0.2}}]
    config = written(tmp_path, epochs=1, dense_baseline=False, onnx=None, latency=None, pruning={"rules": rules})
    result = pat("run", config, "--out", tmp_path / "out")
    assert result.exit_code == 0 and "The target was not met" in result.output
    warning = "warning: pruning.rules[0].end: 90 lies after the last epoch, 0: the target will not be reached"
    assert result.output.count(warning) == 1
    assert result.output.index(warning) < result.output.index("The target was not met")


RULE: dict[str, Any] = {"target": {"macs": 0.6}}
BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"epoch": 3}, "epoch: 'epoch' is not known; did you mean 'epochs'"),
    ({"epochs": 0}, "epochs: 0 is not allowed. Allowed: a whole number of 1 or more"),
    ({"onnx": {"opset": 3}}, "onnx.opset: 3 is refused. "),
    ({"data": {"name": "digits", "std": [0]}}, "data.std[0]: 0 is not allowed. Allowed: a number above 0"),
    (
        {"epochs": 3, "scheduler": {"name": "OneCycleLR", "kwargs": {"max_lr": 0.01, "total_steps": 2}}},
        "scheduler.kwargs: OneCycleLR fails after epoch 2 of 3: Tried to step 3 times",
    ),
    ({"optimizer": {"name": "SDG"}}, "optimizer.name: 'SDG' is not known; did you mean 'SGD'"),
    ({"scheduler": {"name": "Cosine"}}, "scheduler.name: 'Cosine' is not known; did you mean 'CosineAnnealingLR'"),
    ({"pruning": {"rules": [{**RULE, "layers": ["conv2"]}]}}, "layers"),
    ({"pruning": {"rules": [{**RULE, "criterion": "magnitud"}]}}, "did you mean 'magnitude'"),
    ({"pruning": {"rules": [{**RULE, "schedule": "lineer"}]}}, "did you mean 'linear'"),
    ({"pruning": {"rules": [{"target": {"macs": 1.5}}]}}, "pruning.rules[0].target.macs: 1.5 is not allowed"),
    ({"pruning": {"rules": [{"target": {"macs": 0}}]}}, "Allowed: a number in (0, 1]"),
    ({"pruning": {"rules": [{**RULE, "start": 3, "end": 2}]}}, "pruning.rules[0].end: 2 is before start"),
    ({"pruning": {"rules": [{**RULE, "max_sparsity": 0.1}]}}, "target.macs"),
    ({"pruning": "missing.json"}, "missing.json"),
    ({"data": {"name": "npz", "root": "missing.npz"}}, "data.root: there is no"),
    ({"data": {"name": "CIFAR10", "root": "missing", "download": False}}, "does not give CIFAR10"),
    ({"model": {"name": "resnet17", "kwargs": {}}}, "model.name: 'resnet17' is not known; did you mean 'resnet1"),
    ({"model": {"kwargs": {"in_channels": 3}}}, "rejects inputs of shape [(1, 1, 8, 8)]"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS, ids=[message[:40] for _, message in BAD_CONFIGS])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    result = pat("run", written(tmp_path, **changes), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "there is no 'nowhere.yaml'"),
        (["run", "demo.toml"], "demo.toml"),
        (["run", "{tmp}/broken.yaml"], "broken.yaml: line 3, column 1"),
        (["run", "{tmp}/list.yaml"], "it holds a list. Allowed: a mapping"),
        (["run", "{tmp}/pruning.yaml"], "pruning.yaml: this is a pruning config, without model and data. Allowed: an"),
        (["inspect", "{tmp}/pruning.yaml"], "an experiment config, whose 'pruning' may be 'pruning.yaml'"),
        (
            ["run", "demmo"],
            "config: 'demmo' is not known; did you mean 'demo'? Allowed: cifar10_resnet56, demo, family, or",
        ),
        (["inspect", "timm:resnet1"], "model.name: 'timm:resnet1' is not known; did you mean"),
        (["inspect", "resnet17"], "model.name: 'resnet17' is not known"),
        (["inspect", "resnet18", "--input-shape", "1,x"], "--input-shape: '1,x' is not a shape"),
        (["inspect", "resnet18", "--input-shape", "1,0,4,4"], "--input-shape: [1, 0, 4, 4] is not a shape"),
        (["inspect", "resnet18", "--input-shape", "1,1,64,64"], "rejects inputs of shape [(1, 1, 64, 64)]"),
        (["inspect", "torch.nn:ReLU"], "no prunable channel group"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "broken.yaml").write_text("name: a\nmodel: {name: b\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "pruning.yaml").write_text("rules:\n  - target: {macs: 0.5}\n")
    result = pat(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_a_folder_of_the_same_name_does_not_hide_a_shipped_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    result = pat("demo", "--out", tmp_path / "taken")  # it gets as far as the folder for its results
    assert result.exit_code == 2 and "taken' is a file. Allowed: a folder" in result.stderr


def test_debug_adds_the_traceback(tmp_path: Path) -> None:
    result = pat("run", written(tmp_path, epochs=0), "--debug")
    assert result.exit_code == 2 and "Traceback" in result.stderr and "error: " in result.stderr


def test_unknown_commands_and_options_exit_with_2() -> None:
    assert pat("prune").exit_code == pat("run", "demo", "--fast").exit_code == pat("schema", "xml").exit_code == 2


def test_data_and_out_override_the_config(tmp_path: Path) -> None:
    result = pat("run", written(tmp_path, data={"name": "npz", "root": "a.npz"}), "--data", tmp_path / "b.npz")
    assert result.exit_code == 2 and "b.npz" in result.stderr


INSPECTED = """\
*************
Group number 1:
Source conv: conv1
Dependencies:
stages.0.0.conv1
stages.0.0.conv2
stages.1.0.conv1
stages.1.0.shortcut.0
*************

*************
Group number 2:
Source conv: stages.0.0.conv1
Dependencies:
stages.0.0.conv2
*************

*************
Group number 3:
Source conv: stages.1.0.conv1
Dependencies:
stages.1.0.conv2
*************

*************
Group number 4:
Source conv: stages.1.0.conv2
Dependencies:
stages.1.0.shortcut.0
linear
*************

There are 4 groups of layers, with the following source convs:
['conv1', 'stages.0.0.conv1', 'stages.1.0.conv1', 'stages.1.0.conv2']

Left as they are:
linear: reaches an output of the model
"""


def test_inspect_prints_groups_and_costs(tmp_path: Path) -> None:
    result = pat("inspect", written(tmp_path), "--groups")
    assert result.exit_code == 0
    assert result.output.startswith(INSPECTED)
    rows = {line.split()[0]: line.split()[1:] for line in result.output[len(INSPECTED) :].splitlines() if line.strip()}
    assert rows["conv1"] == ["Conv2d", "8x1x3x3", "4.61k", "3.4%", "72"]
    assert rows["linear"] == ["Linear", "10x16", "160", "0.1%", "170"]


@pytest.mark.parametrize("name", ["cifar10_resnet56", "pruningawaretraining.experiment.models:cifar_resnet20"])
def test_inspect_finds_shipped_configs_and_models(name: str) -> None:
    arguments = ["--input-shape", "1,3,32,32"] if ":" in name else []
    result = pat("inspect", name, "--groups", *arguments)
    number = 28 if "56" in name else 10
    assert f"There are {number} groups of layers" in result.output


@pytest.mark.parametrize(
    ("kind", "schema"), [("pruning", json_schema()), ("experiment", experiment_schema())], ids=["pruning", "experiment"]
)
def test_the_schemas_beside_the_configs_are_what_pat_prints(kind: str, schema: dict[str, Any]) -> None:
    assert json.loads(pat("schema", kind).output) == schema
    file = json.loads((ROOT / "configs" / f"{kind}.schema.json").read_text())
    assert _keys(file) == _keys(schema)  # how pydantic words a type differs between its versions


def _keys(schema: dict[str, Any]) -> dict[str, Any]:
    """Models, their keys, and what the keys say they are."""
    models = {"": schema, **schema.get("$defs", {})}
    return {
        name: {key: field.get("description") for key, field in model.get("properties", {}).items()}
        for name, model in models.items()
    }


def test_shipped_configs_name_their_schema_and_load() -> None:
    assert set(shipped_configs()) == {"demo", "cifar10_resnet56", "family"}
    for name, path in shipped_configs().items():
        assert path.read_text().startswith("# yaml-language-server: $schema=experiment.schema.json\n")
        config = load_experiment(path)
        assert config.name == name
        (rule,) = config.pruning.rules
        assert rule.end is not None and rule.end < config.epochs and rule.target.macs is not None


@pytest.mark.slow
def test_the_demo_keeps_its_promise(tmp_path: Path) -> None:
    """Half of the MACs, at most a point of accuracy, ONNX that agrees and is faster; and it can be run again."""
    for _ in range(2):
        assert pat("demo", "--out", tmp_path).exit_code == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    dense, pruned, checks = summary["dense"], summary["pruned"], summary["verification"]
    assert pruned["macs"] <= 0.5 * dense["macs"]
    assert pruned["accuracy"] >= dense["accuracy"] - 0.01
    assert checks["reloaded_onnx"] <= 1e-4 and checks["onnx_accuracy"] == pytest.approx(pruned["accuracy"], abs=0.003)
    assert pruned["latency_ms"] < dense["latency_ms"]


def test_inspect_of_a_rule_for_single_weights(tmp_path: Path) -> None:
    result = pat(
        "inspect", written(tmp_path, pruning={"rules": [{"pattern": "2:4", "target": {"sparsity": 0.5}}]}), "--groups"
    )
    assert result.exit_code == 0, result.output
    assert "Source conv: stages.0.0.conv1.weight" in result.output and "Left as they are" not in result.output


def test_no_message_of_a_command_speaks_of_arguments_of_functions(tmp_path: Path) -> None:
    shaped = pat("inspect", "resnet18", "--input-shape", "1,1,64,64")
    assert "Allowed: another --input-shape" in shaped.stderr and "example_inputs" not in shaped.stderr
    plain = pat("run", written(tmp_path, model={"kwargs": {"in_channels": 3}}), "--out", tmp_path / "out")
    assert "Allowed: data or example inputs that the model takes" in plain.stderr
    assert "example_inputs=" not in plain.stderr and "--input-shape" not in plain.stderr
    nowhere = pat("inspect", "resnet18", "--picture", tmp_path / "none" / "a.svg")
    assert nowhere.exit_code == 2 and "does not exist. Allowed: a file in an existing folder" in nowhere.stderr
