"""``pat plan``: what pruning would do and cost, without training, on a made-up machine; nothing is changed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from test_latency_target import MadeUp
from torch import nn
from typer.testing import CliRunner

from pruningawaretraining import Pruning, count_macs
from pruningawaretraining.cli.common import MEASURING, measuring, spread
from pruningawaretraining.cli.main import app
from pruningawaretraining.config import load_config
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.experiment.models import cifar_resnet20, digits_resnet
from pruningawaretraining.experiment.planning import plan_view
from pruningawaretraining.session.plan import Plan, Planned, PlannedSet, PlanOptions, plan, rule_of

MODELS = "pruningawaretraining.experiment.models:"
IMAGE = torch.zeros(1, 3, 32, 32)
RULE = rule_of(load_config({"rules": [{"target": {"sparsity": 0.5}}]}))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    meter = MadeUp(slower=1.1)
    monkeypatch.setattr("pruningawaretraining.engine.targets._runtime_meter", lambda *_: meter)
    return meter


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return cifar_resnet20().eval()


def parameters(model: nn.Module) -> int:
    return sum(one.numel() for one in model.parameters())


@pytest.mark.parametrize("target", [{"macs": 0.5}, {"parameters": 0.4}, {"latency": 0.6}])
def test_a_plan_is_what_the_pruner_then_does(machine: MadeUp, target: dict[str, float]) -> None:
    model = resnet()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    ((cost, fraction),) = target.items()
    found = plan(model, RULE, IMAGE, [(cost, fraction)])
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
    assert (found.macs, found.parameters) == (count_macs(model, IMAGE), parameters(model))
    pruned = resnet()
    pruner = Pruning(pruned, {"rules": [{"target": target}]}, example_inputs=IMAGE)
    pruner.prune(pruned, 0)
    (row,) = found.targets
    assert (row.macs, row.parameters) == (count_macs(pruned, IMAGE), parameters(pruned))
    assert row.sparsity == pytest.approx(pruner.sparsity)
    widths = {one["source"]: (one["size"], one["kept"]) for one in pruner.describe_sets()}
    assert {one.name: (one.size, one.kept[0]) for one in found.sets} == widths
    dense, kept = (dict(net.named_modules()) for net in (model, pruned))
    for one in found.sets:
        lost = [dense[layer].weight.shape[0] - kept[layer].weight.shape[0] for layer in one.layers]
        assert lost == [one.size - one.kept[0]] * len(one.layers)


def test_latency_is_predicted_and_measured_for_every_target(machine: MadeUp) -> None:
    model, wanted = resnet(), [("latency", 0.6), ("macs", 0.5), ("latency", 0.0001)]
    found = plan(model, RULE, IMAGE, wanted)
    reached, counted, refused = found.targets
    assert found.latency_ms is not None
    assert reached.measured and reached.latency.measured_ms <= 0.6 * found.latency_ms * 1.01
    assert counted.measured and counted.latency.low_ms < counted.latency.measured_ms < counted.latency.high_ms
    assert refused.refused.startswith("0.0001 of the dense cost is out of reach") and refused.macs is None
    assert all(one.kept[2] is None for one in found.sets)
    asked = machine.measured
    predicted = plan(model, RULE, IMAGE, wanted[:2], options=PlanOptions(measured=False))
    assert machine.measured == asked + 4 and not any(one.measured for one in predicted.targets)  # the anchors alone
    late = plan(model, RULE, IMAGE, wanted[:2], options=PlanOptions(seconds=0.0))
    assert [one.measured for one in late.targets] == [False, False]
    assert json.loads(json.dumps(found.to_dict()))["targets"][1]["latency"]["predicted_ms"] > 0


def test_a_model_that_the_runtime_cannot_run_is_planned_without_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise ConfigError("runtime: 'cuda' needs a GPU")

    monkeypatch.setattr("pruningawaretraining.engine.targets._runtime_meter", refused)
    found = plan(resnet(), RULE, IMAGE, [("macs", 0.5)])
    assert found.latency_ms is None and found.targets[0].latency is None and found.targets[0].macs
    assert found.note.startswith("no latency on onnxruntime: ") and "needs a GPU" in found.note
    with pytest.raises(ConfigError, match="needs a GPU"):
        plan(resnet(), RULE, IMAGE, [("latency", 0.5)])


def run(*arguments: str, code: int = 0) -> str:
    found = CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "100"})
    assert found.exit_code == code, found.output
    return found.output


def test_the_command_takes_models_and_experiments(machine: MadeUp, tmp_path: Path) -> None:
    text = run(f"{MODELS}cifar_resnet20", "--input-shape", "1,3,32,32", "--latency", "0.6", "0.5")
    assert "latency 0.6" in text and "latency 0.5" in text and "█" in text
    weights, out = tmp_path / "dense.safetensors", tmp_path / "plan.json"
    save_file(dict(digits_resnet().state_dict()), weights)
    before = weights.read_bytes()
    text = run("demo", "--macs", "0.5", "--params", "0.5", "--weights", str(weights), "--out", str(out))
    assert f"wrote {out}" in text and "no weights are given" not in text and "macs 0.5" in text and "params 0.5" in text
    assert (
        weights.read_bytes() == before
        and sorted(one.name for one in tmp_path.iterdir()) == [out.name, weights.name][::-1]
    )
    rows = json.loads(out.read_text())
    assert [one["target"] for one in rows["targets"]] == ["macs", "parameters"]
    assert rows["targets"][0]["macs"] <= 0.5 * rows["macs"]


def test_calibration_data_decides(machine: MadeUp, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 255, (96, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images=images, labels=np.arange(96) % 10)
    out = tmp_path / "p.json"
    arguments = (f"{MODELS}digits_resnet", "--input-shape", "1,1,8,8", "--macs", "0.5", "--out", str(out))
    rules = []
    for more in ([], ["--data", str(tmp_path / "d.npz")], ["--criterion", "taylor", "--data", str(tmp_path / "d.npz")]):
        run(*arguments, *more)
        rules.append(json.loads(out.read_text())["rule"]["criterion"])
    assert [one if isinstance(one, str) else one["type"] for one in rules] == ["magnitude", "reconstruction", "taylor"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"{MODELS}cifar_resnet20"], "--latency, --macs, --params: none is given"),
        (["demo", "--macs", "1.5"], "--macs: 1.5 is not allowed. Allowed: a number in (0, 1]"),
        (["demo", "--params", "0.5", "0.3", "--macs", "0.5", "2"], "--macs: 2 is not allowed"),
        (["demo", "--macs", "0.5", "--criterion", "magnitud"], "did you mean 'magnitude'"),
        (["resnet1", "--macs", "0.5"], "'resnet1'"),
        (["os:system", "--macs", "0.5"], "os:system"),
        (["demo", "--latency", "0.5", "--runtime", "onnxruntim"], "did you mean 'onnxruntime'"),
        (["demo", "--macs", "0.5", "--out", "p.txt"], "--out: 'p.txt' does not end in .json"),
        (["demo", "--macs", "0.5", "--weights", "none.safetensors"], "there is no 'none.safetensors'"),
        (
            [f"{MODELS}digits_resnet", "--input-shape", "1,1,8,8", "--macs", "0.5", "--criterion", "taylor"],
            "--criterion: 'taylor' needs data. Allowed: --data, or ",
        ),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "300"})
    assert found.exit_code == 2 and message in found.output
    assert list(tmp_path.iterdir()) == []


def test_rules_that_remove_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="rules: none removes channels"):
        rule_of(load_config({"rules": [{"pattern": "element", "target": {"sparsity": 0.5}}]}))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("m --latency 0.5 0.33 --macs 0.4 1e-1", "m --latency 0.5 --latency 0.33 --macs 0.4 --macs 1e-1"),
        ("--latency=0.5 0.33 m", "--latency=0.5 --latency 0.33 m"),
        ("--latency 0.5 m 0.3 --out 3 4", "--latency 0.5 m 0.3 --out 3 4"),
        ("m --latency 0.5,0.33 --out 3,4", "m --latency 0.5 --latency 0.33 --out 3,4"),
        ("--latency 0.5, 0.33, m,3 --macs=0.4,0.3", "--latency 0.5 --latency 0.33 m,3 --macs=0.4 --macs 0.3"),
        ("--latency 0.5,a", "--latency 0.5,a"),
    ],
)
def test_options_take_several_numbers(given: str, meant: str) -> None:
    assert spread(given.split(), {"--latency", "--macs"}) == meant.split()


@pytest.mark.parametrize("width", [80, 120])
def test_bars_are_as_long_as_widths(width: int) -> None:
    sets = (PlannedSet("a.very.long.name.of.a.layer", ("a.very.long.name.of.a.layer", *"bcde"), 64, (32, None)),)
    rows = (Planned("macs", 0.5, 0.5, 50, 20), Planned("latency", 0.1, refused="0.1 is out of reach"))
    console = Console(width=width, file=io.StringIO())
    console.print(plan_view(Plan({}, 100, 40, None, sets, rows), width))
    text = console.file.getvalue()
    assert all(len(line.rstrip()) <= width for line in text.splitlines()) and "…" not in text
    assert text.count("█") == text.count("░") > 2 and " 32" in text and "and 2 more" in text
    assert "latency 0.1: 0.1 is out of reach" in text and "50  0.500" in text and "20  0.500" in text


def test_a_bar_shows_the_first_measurement() -> None:
    import logging

    logger = logging.getLogger(MEASURING)
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    before = (logger.level, logger.propagate, list(logger.handlers))
    with measuring(console):
        for done in range(4):
            about = {"done": done, "total": 3, "what": f"layer {done}", "title": "3 layers", "runtime": "torch"}
            logger.info("", extra={**about, "folder": "/cache"})
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
    text = console.file.getvalue()
    assert "measuring on torch, once for this machine: 3 layers (kept in /cache)" in text and "layer 3" in text
