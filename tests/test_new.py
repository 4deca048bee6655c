"""``pat new`` writes configs that load and run, and ``pat run`` shows the plan before the first epoch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from pruningawaretraining import load_config
from pruningawaretraining.cli.main import app
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.experiment.build import build_model
from pruningawaretraining.experiment.inspection import EVERYTHING, Inspected, _own_inputs
from pruningawaretraining.experiment.new_config import NewConfig, new_config, window
from pruningawaretraining.experiment.schema import ModelConfig, load_experiment

DIGITS = "pruningawaretraining.experiment.models:digits_resnet"


def pat(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "160"})


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 10, 30, 90, 300])
def test_pruning_starts_after_a_quarter_and_leaves_epochs_to_fine_tune(epochs: int) -> None:
    start, end = window(epochs)
    assert 0 <= start <= end < epochs and start == epochs // 4
    assert epochs < 3 or epochs - 1 - end >= max(1, epochs // 5)


def test_a_new_experiment_loads_and_runs(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    made = pat("new", DIGITS, "--epochs", "2", "--input-shape", "1,1,8,8", "--out", path)
    assert made.exit_code == 0 and made.output.strip() == f"wrote {path}"
    config = load_experiment(path)
    (rule,) = config.pruning.rules
    assert (config.epochs, rule.start, rule.end, rule.target.macs) == (2, 0, 0, 0.5)
    text = path.read_text()
    assert "#   1: conv1, 32 channels; with stages.0.0.conv2, stages.0.1.conv2\n" in text  # those that lose outputs
    assert "#   2: stages.0.0.conv1, 32 channels\n" in text and "name: SGD" in text
    assert "linear: reaches an output of the model" in text
    values = yaml.safe_load(text) | {"latency": None, "onnx": None, "dense_baseline": False, "threads": 1}
    values["data"]["train_fraction"] = 0.2
    path.write_text(yaml.safe_dump(values))
    found = pat("run", path, "--out", tmp_path / "run")
    assert found.exit_code == 0, found.output
    assert found.output.index("channel by magnitude") < found.output.index("epoch   0/1")
    assert "until   macs <= 0.5" in found.output


@pytest.mark.parametrize(("data", "root"), [("imagefolder", "DATA"), ("npz", "DATA"), ("CIFAR10", None)])
def test_data_that_is_read_from_a_folder_has_a_place_for_its_path(data: str, root: str | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    assert pat("new", "resnet18", "--data", data, "--input-shape", "1,3,32,32", "--out", path).exit_code == 0
    assert load_experiment(path).data.root == (root and str(tmp_path / root))
    commented = [line.index("#") for line in path.read_text().splitlines() if line.startswith("  ") and " # " in line]
    assert len(set(commented[:2])) == 1, "comments stand below each other"


def test_a_transformer_gets_its_optimizer_and_its_heads(tmp_path: Path) -> None:
    path = tmp_path / "vit.yaml"
    kwargs = ("--input-shape", "1,3,224,224", "--out", path)
    assert pat("new", "vit_tiny_patch16_224", *kwargs).exit_code == 0
    text = path.read_text()
    assert load_experiment(path).optimizer.name == "AdamW" and "# pattern: {type: channel, heads: true}" in text
    assert text.count("is cut into the heads") == 1 and "blocks.*.attn.qkv (12 layers): is cut" in text


def test_a_new_pruning_config_is_for_a_loop(tmp_path: Path) -> None:
    path = tmp_path / "pruning.yaml"
    assert (
        pat("new", "resnet18", "--pruning", "--epochs", "40", "--out", path, "--input-shape", "1,3,64,64").exit_code
        == 0
    )
    (rule,) = load_config(path).rules
    assert (rule.start, rule.end, rule.multiple) == (10, 31, 8)
    again = pat("new", "resnet18", "--pruning", "--out", path)
    assert again.exit_code == 2 and "exists. Allowed: another file, or --overwrite" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet81",), "did you mean"),
        ((DIGITS, "--epochs", "0"), "--epochs: 0"),
        ((DIGITS, "--out", "a.txt"), ".yaml"),
        ((DIGITS, "--data", "folder", "--input-shape", "1,1,8,8"), "--data: 'folder' is not known; did you mean"),
    ],
)
def test_nothing_is_written_for_bad_input(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = pat("new", *arguments)
    assert found.exit_code == 2 and message in found.stderr
    assert not list(tmp_path.iterdir())


def test_a_class_of_transformers_is_built_from_its_default_config() -> None:
    pytest.importorskip("transformers")
    small = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    name = "transformers:ViTForImageClassification"
    model = build_model(ModelConfig(name=name, kwargs={**small, "image_size": 32}), num_classes=7)
    assert tuple(model(torch.zeros(1, 3, 32, 32)).logits.shape) == (1, 7)
    with pytest.raises(ConfigError, match="hidden_sizes.*did you mean 'hidden_size'"):
        build_model(ModelConfig(name=name, kwargs={"hidden_sizes": 3}))
    inputs = _own_inputs(build_model(ModelConfig(name="transformers:BertModel", kwargs=small)), None)
    assert list(inputs) == ["input_ids"] and inputs["input_ids"].dtype == torch.int64


def test_a_model_of_text_gets_a_pruning_config_alone() -> None:
    pytest.importorskip("transformers")
    small = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    model = build_model(ModelConfig(name="transformers:BertModel", kwargs=small))
    seen = Inspected(model, _own_inputs(model, None), load_config(EVERYTHING))
    text = new_config(seen, NewConfig("transformers:BertModel", 4, pruning_alone=True))
    assert "#   1: encoder.layer.0.intermediate.dense, 64 channels\n" in text and "heads: true" in text
    with pytest.raises(ConfigError, match="--pruning: needed for 'transformers:BertModel'"):
        new_config(seen, NewConfig("transformers:BertModel", 4))
