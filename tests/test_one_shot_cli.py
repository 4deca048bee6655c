"""``pat oneshot``: a table, a picture, saved models."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from pruningawaretraining import count_macs, load_pruned
from pruningawaretraining.cli.main import app
from pruningawaretraining.experiment.models import digits_resnet
from pruningawaretraining.experiment.schema import load_experiment

CAP = {"type": "cap", "num_grads": 32, "micro_batch": 2, "fisher_block_size": 32}
RECIPE = """modifiers:
  - !CAPruningModifier {params: ["re:stages.1.*weight"], mask_type: "2:4", num_grads: 8}
  - !GlobalMagnitudePruningModifier {params: [linear.weight], final_sparsity: 0.5}
"""


@pytest.fixture
def experiment(tmp_path):
    torch.manual_seed(0)
    model = digits_resnet()
    torch.save(model.state_dict(), tmp_path / "dense.pt")

    def write(pruning):
        values = {
            "name": "digits",
            "model": {"name": "pruningawaretraining.experiment.models:digits_resnet", "weights": "dense.pt"},
            "data": {"name": "digits", "train_fraction": 0.1},
            "pruning": pruning,
            "epochs": 3,
            "batch_size": 32,
            "dense_baseline": False,
            "latency": None,
            "onnx": None,
            "threads": 1,
        }
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write


def rules(*specs):
    return {"rules": [{"pattern": "unstructured", "target": {"sparsity": 0.5}, **spec} for spec in specs]}


def test_sparsities_make_a_table_a_picture_and_models(experiment, tmp_path):
    out = tmp_path / "out"
    config = experiment(rules({"criterion": CAP, "layers": ["stages.2", "linear"]}))
    done = CliRunner().invoke(
        app, ["oneshot", config, "--sparsities", "0.5", "0.75", "0.9", "--out", str(out), "--save"]
    )
    assert done.exit_code == 0, done.output
    rows = json.loads((out / "oneshot.json").read_text())["rows"]
    assert [row["sparsity"] for row in rows] == [0.0, 0.5, 0.75, 0.9]
    assert rows[0]["zeros"] == 0 and rows[1]["zeros"] < rows[2]["zeros"] < rows[3]["zeros"]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    drawn = (out / "oneshot.svg").read_text()
    assert drawn.startswith("<svg") and 'class="line s-kept"' in drawn and ">dense</text>" in drawn
    assert "0.75" in done.output and "dense" in done.output
    files = ("oneshot.json", "oneshot.svg", *(f"pruned_{level}.safetensors" for level in (0.5, 0.75, 0.9)))
    assert done.output.splitlines()[-1] == "wrote " + ", ".join(str(out / name) for name in files)
    model = load_pruned(digits_resnet(), out / "pruned_0.75.safetensors")
    weights = [p for name, p in model.named_parameters() if p.dim() > 1 and name.startswith(("stages.2", "linear"))]
    total = sum(p.numel() for p in weights)
    assert sum(int((p == 0).sum()) for p in weights) == int(0.75 * total)


def test_channels_too(experiment, tmp_path):
    config = experiment(rules({"criterion": CAP, "pattern": "channel"}))
    done = CliRunner().invoke(
        app,
        [
            "oneshot",
            config,
            "--sparsities",
            "0.25",
            "--compensation",
            "least_squares",
            "--norms",
            "2",
            "--out",
            str(tmp_path),
        ],
    )
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "oneshot.json").read_text())["rows"]
    assert rows[1]["parameters"] < rows[0]["parameters"]
    assert rows[0]["macs"] == count_macs(digits_resnet(), torch.zeros(1, 1, 8, 8)), "of one image"
    assert rows[1]["macs"] < rows[0]["macs"]
    assert "MACs" in done.output and "6.57M" in done.output


def test_a_recipe_of_several_modifiers_prunes_each_to_its_own_target(experiment, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    config = experiment("recipe.yaml")
    done = CliRunner().invoke(app, ["oneshot", config, "--out", str(tmp_path / "out"), "--save"])
    assert done.exit_code == 0, done.output
    (saved,) = (tmp_path / "out").glob("pruned_*.safetensors")
    model = load_pruned(digits_resnet(), saved)
    assert int((model.linear.weight == 0).sum()) == model.linear.weight.numel() // 2
    weight = model.get_submodule("stages.1.1.conv1").weight.movedim(1, -1)
    assert ((weight.unflatten(-1, (-1, 4)) != 0).sum(-1) == 2).all()
    refused = CliRunner().invoke(app, ["oneshot", config, "--sparsities", "0.5"])
    assert refused.exit_code == 2 and "--sparsities: the config has 2 rules" in refused.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--sparsities", "1.5"], "sparsities: 1.5"), (["--compensation", "biass"], "did you mean 'bias'")],
)
def test_mistakes_end_with_a_line(experiment, tmp_path, arguments, message):
    done = CliRunner().invoke(
        app, ["oneshot", experiment(rules({"criterion": CAP})), "--out", str(tmp_path), *arguments]
    )
    assert done.exit_code == 2 and message in done.output


def test_rows_are_logged_to_weights_and_biases_when_asked_for(experiment, tmp_path, monkeypatch):
    logged = []
    run = types.SimpleNamespace(log=logged.append, finish=lambda: logged.append("finished"))
    module = types.SimpleNamespace(init=lambda project, name: logged.append((project, name)) or run)
    config = experiment(rules({"criterion": "magnitude"}))
    monkeypatch.setitem(sys.modules, "wandb", module)
    done = CliRunner().invoke(app, ["oneshot", config, "--out", str(tmp_path), "--wandb", "mine"])
    assert done.exit_code == 0, done.output
    assert logged[0] == ("mine", "digits") and logged[-1] == "finished" and len(logged) == 4
    logged.clear()
    done = CliRunner().invoke(app, ["run", config, "--out", str(tmp_path / "run"), "--wandb", "mine"])
    assert done.exit_code == 0, done.output
    assert [row["epoch"] for row in logged[1:-1]] == [0, 1, 2] and logged[-1] == "finished"
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused = CliRunner().invoke(app, ["oneshot", config, "--out", str(tmp_path / "other"), "--wandb", "mine"])
    assert refused.exit_code == 2 and "--wandb: it is not installed" in refused.output


def test_results_are_not_overwritten_unless_it_is_said_and_no_stale_model_stays(experiment, tmp_path):
    arguments = ["oneshot", experiment(rules({"criterion": "magnitude"})), "--out", str(tmp_path / "o"), "--save"]
    first = CliRunner().invoke(app, [*arguments, "--sparsities", "0.5", "--sparsities", "0.9"])
    assert first.exit_code == 0, first.output
    before = json.loads((tmp_path / "o" / "oneshot.json").read_text())["rows"]
    refused = CliRunner().invoke(app, [*arguments, "--sparsities", "0.5"])
    assert refused.exit_code == 2 and "holds results. Allowed: another --out, or --overwrite" in refused.output
    again = CliRunner().invoke(app, [*arguments, "--sparsities", "0.5", "--overwrite"])
    assert again.exit_code == 0, again.output
    assert [path.name for path in (tmp_path / "o").glob("*.safetensors")] == ["pruned_0.5.safetensors"]
    assert json.loads((tmp_path / "o" / "oneshot.json").read_text())["rows"] == before[:2], "the seed holds"


def test_pat_run_prunes_gradually_by_second_order(experiment, tmp_path):
    pruning = rules({"criterion": CAP, "layers": ["stages"], "schedule": "cubic", "start": 0, "end": 2})
    done = CliRunner().invoke(app, ["run", experiment(pruning), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    model = load_pruned(digits_resnet(), tmp_path / "run" / "pruned.safetensors")
    weights = [p for name, p in model.named_parameters() if p.dim() > 1 and name.startswith("stages")]
    assert sum(int((p == 0).sum()) for p in weights) == sum(p.numel() for p in weights) // 2


GRADUAL = """modifiers:
  - !EpochRangeModifier {start_epoch: 0, end_epoch: 4}
  - !LearningRateFunctionModifier
    {start_epoch: 0, end_epoch: 3, lr_func: cyclic_linear, init_lr: 0.02, final_lr: 0.002, cycle_epochs: 1}
  - !SetLearningRateModifier {start_epoch: 3, learning_rate: 0.001}
  - !CAPruningModifier
    {params: ["re:stages.*weight"], final_sparsity: 0.75, start_epoch: 0, end_epoch: 2, update_frequency: 1,
     num_grads: 16, fisher_block_size: 16, grad_sampler_kwargs: {batch_size: 2}}
"""


def test_pat_run_trains_a_recipe_with_its_epochs_and_learning_rates(experiment, tmp_path):
    (tmp_path / "gradual.yaml").write_text(GRADUAL)
    path = Path(experiment("gradual.yaml"))
    values = yaml.safe_load(path.read_text())
    del values["epochs"]
    path.write_text(yaml.safe_dump(values))
    done = CliRunner().invoke(app, ["run", str(path), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows] == pytest.approx([0.02, 0.02, 0.02, 0.001])
    reached = [0.0, 0.75 * (1 - 0.5**3), 0.75, 0.75]  # cubic in the time that has passed, from 0 at start_epoch
    assert [row["sparsity"] for row in rows] == pytest.approx(reached, abs=1e-3)
    again = load_experiment(tmp_path / "run" / "config.yaml")  # as it was resolved
    assert again.epochs == 4 and len(again.rates) == 2


def test_a_scheduler_of_the_experiment_goes_before_the_rates_of_a_recipe(experiment, tmp_path):
    (tmp_path / "gradual.yaml").write_text(GRADUAL)
    path = Path(experiment("gradual.yaml"))
    assert [type(one).__name__ for one in load_experiment(path).rates] == ["RateFunction", "SetRate"]
    assert load_experiment(path).epochs == 3
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**values, "scheduler": {"name": "StepLR", "kwargs": {"step_size": 2}}}))
    assert load_experiment(path).rates == []
