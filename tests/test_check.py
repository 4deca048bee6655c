"""``pat check`` and ``pat convert``: what they print of every form, and that the native form means the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from pruningawaretraining.cli.main import app
from pruningawaretraining.config.load import load_config
from pruningawaretraining.config.plan import curve, drawing, table

RECIPE = """
training_modifiers:
  - !EpochRangeModifier {start_epoch: 0, end_epoch: 4}
  - !LearningRateFunctionModifier
    {start_epoch: 0, end_epoch: 4, lr_func: linear, init_lr: 0.1, final_lr: 0.0, cycle_epochs: 2}
  - !SetWeightDecayModifier {weight_decay: 0.1}
pruning_modifiers:
  - !GlobalMagnitudePruningModifier
    {params: ["re:stages.*weight"], init_sparsity: 0.4, final_sparsity: eval(last), start_epoch: 0, end_epoch: 2,
     update_frequency: 1, inter_func: linear}
"""
CHANNELS = {
    "channel_sparsity_args": {
        "start_epoch": 1,
        "end_epoch": 2,
        "mac_target": 0.5,
        "epochs_ft": 2,
        "layers": ["stages.0.0.conv1"],
    }
}
STEPS = {
    "target_sparsity": 0.9,
    "pattern": "4x1",
    "end_step": 20,
    "pruning_frequency": 10,
    "sparsity_decay_type": "linear",
}


def pat(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    recipe, channels, steps = (tmp_path / name for name in ("recipe.yaml", "pruning_config.json", "steps.yaml"))
    recipe.write_text(RECIPE, encoding="utf-8")
    channels.write_text(json.dumps(CHANNELS), encoding="utf-8")
    steps.write_text(yaml.safe_dump(STEPS), encoding="utf-8")
    return {"recipe": recipe, "channels": channels, "steps": steps}


def test_a_recipe_is_shown(files: dict[str, Path]) -> None:
    shown = pat(
        "check", files["recipe"], "--set", "last=0.9", "--model", "pruningawaretraining.experiment.models:DigitsResNet"
    )
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert lines[0] == f"{files['recipe']}: sparseml, 4 epochs"
    assert lines[1] == "rule pruning_modifiers[0]: unstructured by magnitude (p 1.0, normalize none), global"
    assert lines[2] == "  layers  param:stages.*weight"
    assert lines[3].startswith("  chosen  ") and "stages.0.0.conv1" in lines[3]
    assert lines[4:7] == ["  epoch       0     1    2", "  sparsity  0.4  0.65  0.9", "  ▄▆██"]
    assert lines[7:9] == ["learning rate", "  epoch    0     1    2     3"]
    assert lines[9] == "  rate   0.1  0.05  0.1  0.05"
    assert lines[11:] == [
        "without effect, or different here",
        "  training_modifiers[2] (SetWeightDecayModifier) is ignored: the weight decay is the optimizer's",
    ]


def test_channels_and_steps_are_shown(files: dict[str, Path]) -> None:
    shown = pat("check", files["channels"], files["steps"])
    assert shown.exit_code == 0, shown.output
    assert "  until   macs <= 0.5\n  epoch      1  2\n  at most  0.5  1\n" in shown.output
    assert "channel_sparsity_args.epochs_ft is ignored: the loop decides how long it trains" in shown.output
    assert "  step   0    10   20\n  about  0  0.45  0.9\n" in shown.output


def test_every_file_is_looked_at_and_a_bad_one_ends_with_2(files: dict[str, Path]) -> None:
    shown = pat("check", files["recipe"], files["steps"])
    assert shown.exit_code == 2
    assert "has 'last' in it" in shown.output and f"{files['steps']}: intel" in shown.output
    assert pat("check", files["recipe"], "--set", "last").exit_code == 2


@pytest.mark.parametrize("name", ["recipe", "channels", "steps"])
@pytest.mark.parametrize("ending", [".yaml", ".json"])
def test_the_native_form_means_the_same(files: dict[str, Path], tmp_path: Path, name: str, ending: str) -> None:
    out = tmp_path / f"native{ending}"
    variables: dict[str, Any] = {"last": 0.9} if name == "recipe" else {}
    options = [f"--set={key}={value}" for key, value in variables.items()]
    done = pat("convert", files[name], "--out", out, *options)
    assert done.exit_code == 0, done.output
    assert load_config(out) == load_config(files[name], variables)
    assert ("# From" in out.read_text(encoding="utf-8")) == (ending == ".yaml")
    assert pat("convert", files[name], "--out", tmp_path / "native.txt", *options).exit_code == 2


def test_a_converted_file_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "native.yaml"
    assert pat("convert", files["channels"], "--out", out).output == f"wrote {out}\n" and out.is_file()


def test_tables_and_drawings() -> None:
    assert table([("0", "0.5"), ("10", "1")], ("epoch", "x")) == ["  epoch    0  10", "  x      0.5   1"]
    assert table([(str(number), "1") for number in range(30)], ("a", "b"))[0] == (
        "  a  0  1  2  3  4  5  ...  24  25  26  27  28  29"
    )
    assert drawing([0.0, 0.5, 1.0]) == "▁▅█" and len(drawing([1.0] * 500)) == 60
    assert curve([(1, 0.5), (3, 0.9)], 4) == [0.0, 0.5, 0.5, 0.9, 0.9]


FRACTIONS = """
pruning_modifiers:
  - !GMPruningModifier
    {params: ["re:a.*"], init_sparsity: 0.4, final_sparsity: 0.8, start_epoch: 1, end_epoch: 2, update_frequency: 0.25,
     inter_func: linear}
  - !ACDCPruningModifier
    {params: ["re:b.*"], compression_sparsity: 0.8, start_epoch: 0, end_epoch: 10, update_frequency: 2}
  - !MovementPruningModifier
    {params: ["re:c.*"], init_sparsity: 0.2, final_sparsity: 0.8, start_epoch: 0, end_epoch: 1, inter_func: linear}
"""


def test_events_at_fractions_and_dense_phases_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(FRACTIONS, encoding="utf-8")
    lines = pat("check", path).output.splitlines()
    assert "  epoch       1  1.25  1.5  1.75    2" in lines
    assert "  sparsity  0.4   0.5  0.6   0.7  0.8" in lines
    assert "  epoch       2  4    6    8" in lines
    assert "  sparsity  0.8  0  0.8  0.8" in lines
    assert "  ▁▁▇▇▁▁▇▇▇▇" in lines
    assert "  events  at every step; --steps shows them, here 2 of an epoch" in lines
    assert "  epoch       0  0.5    1" in lines
    with_steps = pat("check", path, "--steps", "3").output.splitlines()
    assert "  step        0    1    2    3" in with_steps
    assert "  sparsity  0.2  0.4  0.6  0.8" in with_steps


def test_an_experiment_is_shown_with_the_layers_of_its_model(tmp_path: Path) -> None:
    named, written = pat("check", "demo"), tmp_path / "experiment.yaml"
    assert named.exit_code == 0 and ": experiment, 30 epochs" in named.output
    assert "until   macs <= 0.5" in named.output and ": conv1, stages.0.0.conv1, " in named.output
    assert pat("new", "resnet18", "--input-shape", "1,3,32,32", "--out", written).exit_code == 0
    shown = pat("check", written)
    assert shown.exit_code == 0 and ": conv1, layer1.0.conv1, " in shown.output, "what the file of `pat new` says to do"
    unread = pat("check", written, "--model", "resnet17")
    assert unread.exit_code == 2 and "did you mean 'resnet18'" in unread.output


def test_a_pattern_without_quotes_is_no_number_to_the_base_of_60(tmp_path: Path) -> None:
    path = tmp_path / "pruning.yaml"
    path.write_text("rules:\n  - pattern: 2:4\n    target: {sparsity: 0.5}\n", encoding="utf-8")
    assert load_config(path).rules[0].pattern == "2:4"


NET = "pruningawaretraining.experiment.models:DigitsResNet"
WHOLE: list[tuple[dict[str, Any], str]] = [
    (  # nine columns
        {"pattern": "channelx1", "op_names": ["^conv1$"], "target_sparsity": 0.9, "end_step": 2,
         "sparsity_decay_type": "linear"},
        "  step      0       1       2\n  sparsity  0    0.45     0.9\n  reached   0  0.4444  0.8889\n",
    ),
    ({"pattern": "4x1", "target_sparsity": 0.5}, "  step        0\n  sparsity  0.5\n"),
    (  # 32 channels, in eights
        {"channel_sparsity_args": {"global_prune_rate": 0.6, "block_size": 8, "layers": ["stages.0.0.conv1"],
                                   "input_shape": [1, 1, 8, 8]}},
        "  epoch        0\n  sparsity   0.6\n  reached   0.75\n",
    ),
    (  # 96 blocks
        {"modifiers": [{"!tag": "!ACDCPruningModifier", "params": ["conv1.weight"], "compression_sparsity": 0.85,
                        "start_epoch": 0, "end_epoch": 10, "update_frequency": 2, "mask_type": "block4"}]},
        "  epoch          2  4       6       8\n  sparsity    0.85  0    0.85    0.85\n"
        "  reached   0.8438  0  0.8438  0.8438\n",
    ),
    (  # what needs training to be known
        {"modifiers": [{"!tag": "!RigLPruningModifier", "params": ["conv1.weight"], "final_sparsity": 0.7,
                        "start_epoch": 0, "end_epoch": 2, "update_frequency": 1}]},
        "  epoch       0    1    2\n  sparsity  0.7  0.7  0.7\n",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "expected"), WHOLE, ids=range(len(WHOLE)))
def test_whole_groups_of_a_model_are_counted(config: dict[str, Any], expected: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tagged(config)), encoding="utf-8")
    shown = pat("check", path, "--model", NET)
    assert expected in shown.output, shown.output
    assert ("  reached" in shown.output) == ("  reached" in expected)


def tagged(config: Any) -> Any:
    """A config with the tags of its modifiers as keys, which recipes may have as well."""
    if isinstance(config, dict) and "!tag" in config:
        return {config["!tag"].lstrip("!"): {key: value for key, value in config.items() if key != "!tag"}}
    if isinstance(config, dict):
        return {key: tagged(value) for key, value in config.items()}
    return [tagged(value) for value in config] if isinstance(config, list) else config


def test_settings_of_a_training_are_no_config(tmp_path: Path) -> None:
    file = tmp_path / "deit.yaml"
    file.write_text("aa: rand-m9\namp: true\nbatch_size: 4\nmodel: deit_small\nopt: adamw\nsched: cosine\nlr: 0.1\n")
    result = CliRunner().invoke(app, ["check", str(file)])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "are settings of a training, and there is no pruning config" in line


def test_errors_about_layers_name_the_file(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.yaml", "b.yaml")]
    files[0].write_text("rules:\n  - {pattern: unstructured, target: {sparsity: 0.5}}\n")
    files[1].write_text("rules:\n  - pattern: unstructured\n    target: {sparsity: 0.5}\n    layers: [conv77]\n")
    result = CliRunner().invoke(app, ["check", *map(str, files), "--model", "demo"])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {files[1]}: line 4: rules[0].layers: 'conv77' is not known")


def test_a_missing_variable_is_given_by_set(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("modifiers: [!GMPruningModifier {init_sparsity: 0.1, final_sparsity: 0.5, end_epoch: eval(n)}]")
    result = CliRunner().invoke(app, ["check", str(file)])
    assert result.stderr.rstrip().endswith("other values are given as --set NAME=VALUE")
