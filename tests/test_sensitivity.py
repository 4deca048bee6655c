"""Sensitivity of single sets, and the caps that a rule takes from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from experiment_fixture import tiny
from safetensors.torch import save_file
from typer.testing import CliRunner

from pruningawaretraining import Pruning, load_config
from pruningawaretraining.allocation.ranking import Allocator, Limits
from pruningawaretraining.analysis.sensitivity import SensitivityOptions, cap, measure, page
from pruningawaretraining.cli.main import app
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.experiment.build import build_model
from pruningawaretraining.experiment.models import DigitsResNet
from pruningawaretraining.experiment.schema import load_experiment
from pruningawaretraining.groups.grouping import Grouping, GroupSet

EXAMPLE = torch.randn(1, 1, 8, 8)


def weights(folder: Path) -> Path:
    torch.manual_seed(3)
    model = build_model(load_experiment(tiny()).model, 10, 1)
    save_file(model.state_dict(), folder / "dense.safetensors")
    return folder / "dense.safetensors"


def test_each_set_is_pruned_alone_by_score(tmp_path: Path) -> None:
    """Each accuracy is that of a fresh model whose lowest groups of this set are masked, and of nothing else."""
    config = load_experiment(tiny())
    options = SensitivityOptions((0.25, 0.5), 0.05, 60, weights(tmp_path))
    found = measure(config, options)
    assert found["images"] == 60 and found["tolerance"] == 0.05
    model = build_model(config.model.model_copy(update={"weights": str(options.weights)}), 10, 1)
    pruner = Pruning(model, config.pruning, example_inputs=EXAMPLE)
    assert list(found["sets"]) == [one.name for one in pruner.channel_pruner.dense_sets]
    for one in pruner.channel_pruner.dense_sets:
        rows = found["sets"][one.name]["rows"]
        assert [row["kept"] for row in rows] == [one.size - one.size // 4, one.size - one.size // 2]
        assert all(0 <= row["accuracy"] <= 1 for row in rows)
    again = measure(config, options)
    assert again == found, "the model is dense again before each measurement"
    alone = measure(config, SensitivityOptions((0.5,), 0.05, 60, weights(tmp_path)))
    for name, one in found["sets"].items():
        assert alone["sets"][name]["rows"][0] == one["rows"][1]


def test_a_rule_that_is_not_for_channels_is_said(tmp_path: Path) -> None:
    config = load_experiment(tiny(pruning={"rules": [{"pattern": "2:4", "target": {"sparsity": 0.5}}]}))
    with pytest.raises(ConfigError, match=r"pruning.rules: none is for channels, .*'2:4'.*Allowed: a rule"):
        measure(config, SensitivityOptions((0.5,), 0.05, 60, weights(tmp_path)))


@pytest.mark.parametrize(
    ("out", "message"),
    [("none/a.json", "does not exist. Allowed: a file in an existing folder"), ("sens", "does not end in .json")],
)
def test_where_the_result_may_go(tmp_path: Path, out: str, message: str) -> None:
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(tiny()))
    arguments = ["sensitivity", str(tmp_path / "e.yaml"), "--out", str(tmp_path / out)]
    result = CliRunner().invoke(app, [*arguments, "--weights", str(weights(tmp_path))])
    assert result.exit_code == 2 and result.stderr.startswith("error: --out: ") and message in result.stderr


def test_weights_are_needed(tmp_path: Path) -> None:
    config = load_experiment(tiny(out=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="model.weights: missing, and "):
        measure(config, SensitivityOptions())


@pytest.mark.parametrize(
    ("values", "message"),
    [({"sparsities": (0.0,)}, "--sparsities"), ({"tolerance": 1.5}, "--tolerance"), ({"images": -1}, "--images")],
)
def test_options_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SensitivityOptions(**values)


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [((0.90, 0.895, 0.85), 0.5), ((0.85, 0.90, 0.90), 0.0), ((0.9, 0.9, 0.91), 0.75), ((0.9, 0.8, 0.9), 0.25)],
)
def test_the_cap_is_before_the_first_that_costs_too_much(accuracies: tuple[float, ...], expected: float) -> None:
    rows = list(zip((0.25, 0.5, 0.75), accuracies, strict=True))
    assert cap(rows, 0.9, SensitivityOptions(tolerance=0.01)) == expected


def test_the_page_shows_the_most_sensitive_first() -> None:
    def one(low: float, most: float) -> dict[str, Any]:
        rows = [{"sparsity": 0.5, "kept": 4, "accuracy": low}]
        return {"groups": 8, "rows": rows, "max_sparsity": most}

    found = {"name": "n", "accuracy": 0.9, "images": 10, "tolerance": 0.01}
    shown = page({**found, "sets": {"easy": one(0.9, 0.5), "hard": one(0.4, 0.0), "some": one(0.8, 0.0)}})
    assert [each["name"] for each in shown["sets"]] == ["hard", "some", "easy"]
    assert [each["cells"][0]["text"] for each in shown["sets"]] == ["−50.0", "−10.0", "0.0"]
    assert [each["cells"][0]["heat"] for each in shown["sets"]] == [100, 20, 0]


def test_command_and_config_end_to_end(tmp_path: Path) -> None:
    experiment = tmp_path / "e.yaml"
    experiment.write_text(yaml.safe_dump(tiny()))
    out = tmp_path / "found" / "sensitivity.json"
    out.parent.mkdir()
    arguments = ["sensitivity", str(experiment), "--sparsities", "0.25", "0.5", "--images", "40", "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--weights", str(weights(tmp_path))])
    assert result.exit_code == 0, result.output
    assert "max_sparsity" in result.output and out.with_suffix(".html").is_file()
    caps = {name: one["max_sparsity"] for name, one in json.loads(out.read_text())["sets"].items()}
    rule = {"target": {"sparsity": 0.1}, "max_sparsity_from": "found/sensitivity.json"}
    experiment.write_text(yaml.safe_dump(tiny(pruning={"rules": [rule]})))
    assert load_experiment(experiment).pruning.rules[0].max_sparsity_from == caps, "relative to the file"
    (tmp_path / "pruning.yaml").write_text(yaml.safe_dump({"rules": [rule]}))
    assert load_config(tmp_path / "pruning.yaml").rules[0].max_sparsity_from == caps


def test_caps_bind_set_by_set() -> None:
    sets = (GroupSet("a", 0, 10), GroupSet("b", 10, 20), GroupSet("c", 20, 30))
    limits = Limits(max_sparsity=0.8, caps={"a": 0.0, "b": 0.35, "c": 0.9})
    allocator = Allocator(Grouping("channel", (), sets), torch.arange(30.0), limits)
    keep = allocator.smallest()
    assert [int(keep[one.start : one.stop].sum()) for one in sets] == [10, 7, 2]
    half = allocator.at(0.3)
    assert int((~half).sum()) == 9 and bool(half[:10].all()), "what a capped set may not lose goes elsewhere"


def test_a_rule_keeps_to_its_caps() -> None:
    model = DigitsResNet(widths=(8, 16), blocks=1)
    caps = {"stages.0.0.conv1": 0.0, "conv1": 0.25}
    rule = {"target": {"macs": 0.5}, "max_sparsity_from": caps}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=EXAMPLE)
    pruner.prune(epoch=0)
    assert pruner.phase == "finetune"
    kept = {group["source"]: (group["kept"], group["size"]) for group in pruner.describe_sets()}
    assert kept["stages.0.0.conv1"] == (8, 8) and kept["conv1"][0] >= 6


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"max_sparsity_from": "nothing.json"}, "max_sparsity_from: 'nothing.json' cannot be read"),
        ({"max_sparsity_from": {"conv1": 1.5}}, "max_sparsity_from"),
        ({"max_sparsity_from": {"conv1": 0.5}, "pattern": "2:4"}, "is not supported by the pattern '2:4'"),
    ],
)
def test_bad_caps_are_refused_by_the_config(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"rules": [{"target": {"sparsity": 0.5}, **rule}]})


@pytest.mark.parametrize("caps", [{"conf1": 0.5}, {"linear": 0.5}])
def test_caps_of_no_set_are_refused(caps: dict[str, float]) -> None:
    rule = {"target": {"sparsity": 0.5}, "max_sparsity_from": caps}
    with pytest.raises(ConfigError, match=r"rules\[0\].max_sparsity_from: .*conv1"):
        Pruning(DigitsResNet(widths=(8, 16), blocks=1), {"rules": [rule]}, example_inputs=EXAMPLE)
