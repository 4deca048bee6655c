"""Recipes of SparseML and of CAP's version of it: what differs between them, and modifiers on the same layers.

The numbers are those of the originals' own functions, worked out with them and written down here.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

from pruningawaretraining import Pruning, load_config
from pruningawaretraining.cli.main import app
from pruningawaretraining.config.recipe import load_recipe
from pruningawaretraining.config.schema import PruningConfig
from pruningawaretraining.errors import ConfigError

KEYS = {"params": ["re:.*weight"], "update_frequency": 1, "inter_func": "linear"}
CAP = {"num_grads": 4, "fisher_block_size": 8}


def modifier(name: str, **keys: Any) -> dict[str, Any]:
    return {"!tag": f"!{name}", **keys}


def gradual(name: str, first: float, last: float, start: float, end: float, **keys: Any) -> dict[str, Any]:
    times = {"init_sparsity": first, "final_sparsity": last, "start_epoch": start, "end_epoch": end}
    return modifier(name, **{**KEYS, **times, **keys})


def recipe(*modifiers: dict[str, Any]) -> PruningConfig:
    return load_config({"modifiers": list(modifiers)})


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 20))


def pruner_of(config: PruningConfig) -> tuple[nn.Sequential, Pruning, torch.optim.Optimizer]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = Pruning(model, config, optimizer=optimizer)
    pruner.calibrate_with([(torch.randn(8, 16), torch.randn(8, 20))] * 4, nn.functional.mse_loss)
    return model, pruner, optimizer


def zeros(model: nn.Module) -> torch.Tensor:
    return torch.cat([one.weight.detach().flatten() == 0 for one in model if isinstance(one, nn.Linear)])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()


# --- modifiers on the same layers ---------------------------------------------------------------------------------

FIRST = gradual("GMPruningModifier", 0.1, 0.5, 0, 2)
OVER = [
    ("another criterion", [FIRST, gradual("MovementPruningModifier", 0.5, 0.8, 2, 4)],
     [0.1, 0.3, 0.5, 0.65, 0.8]),
    ("second order", [FIRST, gradual("CAPruningModifier", 0.6, 0.9, 3, 5, **CAP)], [0.1, 0.3, 0.5, 0.6, 0.75, 0.9]),
    ("second order first", [gradual("OBSPruningModifier", 0.2, 0.4, 0, 1, global_sparsity=False, **CAP),
                            gradual("GMPruningModifier", 0.4, 0.6, 1, 3)], [0.2, 0.4, 0.5, 0.6]),
    ("another scope", [FIRST, gradual("GlobalMagnitudePruningModifier", 0.5, 0.7, 2, 4)], [0.1, 0.3, 0.5, 0.6, 0.7]),
    ("a lower start", [FIRST, gradual("GlobalMagnitudePruningModifier", 0.0, 0.6, 2, 4)], [0.1, 0.3, 0.5, 0.5, 0.6]),
    ("at the same time", [FIRST, gradual("GMPruningModifier", 0.0, 0.8, 1, 5)], [0.1, 0.3, 0.5, 0.5, 0.6, 0.8]),
]  # fmt: skip


@pytest.mark.parametrize(("modifiers", "expected"), [row[1:] for row in OVER], ids=[row[0] for row in OVER])
def test_modifiers_on_the_same_layers_nest(modifiers: list[dict[str, Any]], expected: list[float]) -> None:
    model, pruner, optimizer = pruner_of(recipe(*modifiers))
    before = torch.zeros_like(zeros(model))
    for epoch, sparsity in enumerate(expected):
        train(model, optimizer)
        pruner.prune(model, epoch)
        train(model, optimizer)
        here = zeros(model)
        assert bool(here[before].all()), "a mask came back"
        assert float(here.float().mean()) == pytest.approx(sparsity, abs=2e-3)
        assert pruner.sparsity == pytest.approx(float(here.float().mean()), abs=1e-6)
        assert torch.equal(torch.cat(list(pruner.masks.values())), ~here)
        before = here
    parameters = pruner.report().to_dict()["parameters"]
    assert parameters["dense"] - parameters["kept"] == int(before.sum())
    assert [row["size"] for row in pruner.describe_sets()] == [512, 640]


def test_a_block_mask_over_single_weights_is_the_union_of_both() -> None:
    later = gradual("GMPruningModifier", 0.5, 0.5, 1, 2, mask_type="block4")
    model, pruner, optimizer = pruner_of(recipe(gradual("GMPruningModifier", 0.5, 0.5, 0, 1), later))
    pruner.prune(model, 0)
    single = zeros(model)
    norms = torch.cat([one.weight.detach().abs().view(-1, 4).sum(1) for one in model if isinstance(one, nn.Linear)])
    pruner.prune(model, 1)
    train(model, optimizer)
    parts, masked = norms.split([128, 160]), []
    for part in parts:
        masked.append(torch.zeros_like(part, dtype=torch.bool).index_fill_(0, part.argsort()[: len(part) // 2], True))
    assert torch.equal(zeros(model), single | torch.cat(masked).repeat_interleave(4))
    assert pruner.sparsity == pytest.approx(float(zeros(model).float().mean()))


def test_nested_rules_go_on_from_a_state() -> None:
    config = recipe(FIRST, gradual("MovementPruningModifier", 0.5, 0.8, 2, 4))
    ends = []
    for stop in (None, 3):
        model, pruner, optimizer = pruner_of(config)
        torch.manual_seed(1)
        for epoch in range(5):
            if epoch == stop:
                saved = pruner.state_dict(), model.state_dict(), optimizer.state_dict()
                kept = torch.get_rng_state()
                model, pruner, optimizer = pruner_of(config)
                pruner.load_state_dict(saved[0])
                model.load_state_dict(saved[1])
                optimizer.load_state_dict(saved[2])
                torch.set_rng_state(kept)
            pruner.prune(model, epoch)
            train(model, optimizer)
        ends.append(model[0].weight.detach().clone())
    assert torch.equal(*ends)


def test_a_lock_after_masks_that_are_lifted_keeps_their_zeros() -> None:
    lifted = gradual("GMPruningModifier", 0.5, 0.5, 0, 1, leave_enabled=False)
    constant = modifier("ConstantPruningModifier", params=["re:.*weight"], start_epoch=1)
    model, pruner, optimizer = pruner_of(recipe(lifted, constant))
    pruner.prune(model, 0)
    pruner.prune(model, 1)
    train(model, optimizer)
    assert float(zeros(model).float().mean()) == pytest.approx(0.5)


SECONDS = {
    "magnitude": gradual("GMPruningModifier", 0.1, 0.5, 0, 2),
    "global": gradual("GlobalMagnitudePruningModifier", 0.1, 0.6, 1, 3),
    "movement": gradual("MovementPruningModifier", 0.1, 0.7, 2, 4),
    "cap": gradual("CAPruningModifier", 0.1, 0.5, 1, 2, **CAP),
    "blocks": gradual("GMPruningModifier", 0.2, 0.4, 0, 3, mask_type="block4"),
    "windows": gradual("OBSPruningModifier", 0.5, 0.5, 3, 4, mask_type="2:4", **CAP),
    "part": gradual("GMPruningModifier", 0.2, 0.4, 0, 3, params=["0.weight"]),
    "lock": modifier("ConstantPruningModifier", params=["re:.*weight"]),
    "acdc": modifier("ACDCPruningModifier", params=["re:.*weight"], compression_sparsity=0.5, start_epoch=0,
                     end_epoch=8, update_frequency=2),
    "rigl": modifier("RigLPruningModifier", params=["re:.*weight"], final_sparsity=0.5, start_epoch=0, end_epoch=4,
                     update_frequency=1),
    "wanda": {"!tag": "!WandaPruningModifier", "sparsity": 0.5, "targets": ["Linear"], "mask_structure": "2:4"},
}  # fmt: skip


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(SECONDS, 2)))
def test_what_loads_is_what_pruning_takes(one: str, other: str) -> None:
    changing = {one, other} <= {"acdc", "rigl"}
    try:
        config = recipe(SECONDS[one], SECONDS[other])
    except ConfigError as error:
        assert changing, str(error)
        assert "the masks of both change" in str(error)
        return
    assert not changing
    model, pruner, optimizer = pruner_of(config)
    for epoch in range(5):
        pruner.prune(model, epoch)
        train(model, optimizer, 1)
    pruner.on_train_end()
    in_groups = {one, other} == {"part", "blocks"}  # blocks of one layer and entries of the other count alike
    assert pruner.sparsity == pytest.approx(float(zeros(model).float().mean()), abs=0.02 if in_groups else 1e-6)


def test_check_says_what_pruning_would(tmp_path: Path) -> None:
    rules = [
        {"name": name, "pattern": "unstructured", "layers": ["stages.0"], "target": {"sparsity": 0.5}} for name in "ab"
    ]
    path = tmp_path / "both.yaml"
    for nested in (False, True):
        rules[1]["nested"] = nested
        path.write_text(yaml.safe_dump({"rules": rules}), encoding="utf-8")
        shown = CliRunner().invoke(
            app, ["check", str(path), "--model", "pruningawaretraining.experiment.models:DigitsResNet"]
        )
        assert shown.exit_code == (0 if nested else 2), shown.output
        if not nested:
            assert "is pruned by a (unstructured) already" in shown.output


# --- AC/DC ------------------------------------------------------------------------------------------------------------

PHASES = [
    ({"start_epoch": 0, "end_epoch": 35, "update_frequency": 5}, "11111000001111100000111110000011111"),
    ({"start_epoch": 0, "end_epoch": 21, "update_frequency": 3, "dense_fraction": 0.34}, "111100111100" + "111000111"),
    (
        {"start_epoch": 2, "end_epoch": 25, "update_frequency": 3, "last_decompression_epochs": 4,
         "last_compression_epochs": 4},
        "00" + "111000" * 2 + "111" + "0000" + "1111",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "expected"), PHASES, ids=range(len(PHASES)))
@pytest.mark.parametrize("name", ["Magnitude", "GlobalMagnitude"])
def test_acdc_of_cap_begins_sparse(name: str, keys: dict[str, Any], expected: str) -> None:
    given = {"params": ["re:.*weight"], "compression_sparsity": 0.75, **keys}
    (rule,) = recipe(modifier(f"ACDC_{name}PruningModifier", **given)).rules
    assert rule.scope == ("local" if name == "Magnitude" else "global")
    model, pruner, _ = pruner_of(PruningConfig(rules=[rule]))
    phases = ""
    for epoch in range(len(expected)):
        pruner.prune(model, epoch)
        phases += "1" if pruner.sparsity == pytest.approx(0.75) else "0" if pruner.sparsity == 0 else "?"
    assert phases == expected


def test_what_acdc_of_cap_refuses_and_says(caplog: pytest.LogCaptureFixture) -> None:
    keys = {"params": ["re:.*weight"], "compression_sparsity": 0.75, "start_epoch": 0, "update_frequency": 5}
    with pytest.raises(ConfigError, match=r"end_epoch: 20 leaves no room for its phases. Allowed: 25 or later"):
        recipe(modifier("ACDC_MagnitudePruningModifier", **keys, end_epoch=20))
    (rule,) = recipe(modifier("ACDC_MagnitudePruningModifier", **keys, end_epoch=40)).rules
    assert rule.timeline().events() == [0, 5, 10, 15, 20, 25, 30]
    assert "end_epoch is ignored: the last sparse phase goes on at 35, where CAP would train dense" in caplog.text


# --- the schedule of a modifier that leaves something out -----------------------------------------------------------

ENDLESS = [
    ({"init_sparsity": 0.05, "final_sparsity": 0.9}, {0: 0.05}),
    ({"init_sparsity": 0.05, "final_sparsity": 0.9, "start_epoch": 3}, {3: 0.05}),
    ({"init_sparsity": 0.6, "final_sparsity": 0.6}, {0: 0.6}),
]


@pytest.mark.parametrize(("keys", "expected"), ENDLESS, ids=range(len(ENDLESS)))
@pytest.mark.parametrize("shape", ["linear", "cubic", "inverse_cubic"])
def test_a_modifier_without_an_end_stays_at_its_initial_sparsity(
    keys: dict[str, Any], expected: dict[int, float], shape: str, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"params": ["re:.*weight"], "end_epoch": -1, "update_frequency": 1, "inter_func": shape, **keys}
    (rule,) = recipe(modifier("GMPruningModifier", **given)).rules
    times = rule.timeline()
    assert {now: times.sparsity(now) for now in times.events()} == pytest.approx(expected)
    said = "stays at init_sparsity for good" in caplog.text
    assert said == (keys["init_sparsity"] != keys["final_sparsity"])


def test_a_modifier_without_an_end_from_what_is_there_locks_it() -> None:
    keys = {"params": ["re:.*weight"], "init_sparsity": "__FROM_PARAM__", "final_sparsity": 0.9, "end_epoch": -1}
    config = recipe(modifier("GMPruningModifier", **keys))
    assert [rule.mode for rule in config.rules] == ["lock"]
    (rule,) = recipe(modifier("GMPruningModifier", **{**keys, "init_sparsity": 0.0})).rules
    assert not rule.enabled


def test_without_the_key_of_an_end_all_goes_at_once_as_in_one_shot(caplog: pytest.LogCaptureFixture) -> None:
    keys = {"params": ["re:.*weight"], "final_sparsity": 0.9, "start_epoch": 2}
    (rule,) = recipe(modifier("GMPruningModifier", **keys)).rules
    times = rule.timeline()
    assert {now: times.sparsity(now) for now in times.events()} == {2: 0.9} and not caplog.records
    (rule,) = recipe(modifier("GMPruningModifier", **keys, init_sparsity=0.1)).rules
    assert rule.target.sparsity == 0.9 and "init_sparsity is ignored: without end_epoch" in caplog.text


@pytest.mark.parametrize("frequency", [{"update_frequency": -1}, {}], ids=["-1", "none"])
def test_without_a_frequency_every_step_is_an_event(frequency: dict[str, float]) -> None:
    given = {"params": ["re:.*weight"], "init_sparsity": 0.2, "final_sparsity": 0.8, "start_epoch": 0, "end_epoch": 2}
    (rule,) = recipe(modifier("GMPruningModifier", **given, inter_func="linear", **frequency)).rules
    times = rule.timeline(steps=3)
    assert [times.sparsity(now) for now in times.events()] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])


# --- learning rates -------------------------------------------------------------------------------------------------

PRUNES = gradual("GMPruningModifier", 0.1, 0.5, 0, 2)
CAP_PRUNES = gradual("CAPruningModifier", 0.1, 0.5, 0, 2)
RATES: list[tuple[str, dict[str, Any], dict[str, Any], dict[float, float]]] = [
    ("SparseML's", PRUNES, {"lr_func": "linear"}, {0.0: 0.1, 1.0: 0.075, 3.75: 0.00625, 4.0: 0.0, 5.0: 0.0}),
    ("SparseML's", PRUNES, {"lr_func": "cosine"}, {0.0: 0.1, 1.0: 0.0853553391, 2.0: 0.05, 4.0: 0.0}),
    ("a modifier", CAP_PRUNES, {"lr_func": "linear"}, {0.0: 0.1, 1.0: 0.0733333333, 3.75: 0.0}),
    ("cycles", PRUNES, {"lr_func": "linear", "cycle_epochs": 2}, {0.0: 0.1, 1.0: 0.0428571429, 1.75: 0.0, 2.0: 0.1}),
    ("a key", PRUNES, {"lr_func": "linear", "cycle_mul": 1.0}, {1.0: 0.0733333333, 3.75: 0.0}),
    ("a key of pruning", {**PRUNES, "!tag": "!OBSPruningModifier", "recomputation_inter_func": "linear"},
     {"lr_func": "linear"}, {1.0: 0.0733333333, 3.75: 0.0}),
    ("SparseML's", PRUNES, {"lr_func": "cyclic_linear", "cycle_epochs": 4, "end_epoch": 7},
     {0.0: 0.1, 1.0: 0.0733333333, 3.75: 0.0, 5.0: 0.0272727273, 6.0: 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("pruning", "keys", "expected"), [row[1:] for row in RATES], ids=[row[0] for row in RATES])
def test_each_flavour_has_its_own_learning_rates(
    pruning: dict[str, Any], keys: dict[str, Any], expected: dict[float, float]
) -> None:
    given = {"start_epoch": 0, "end_epoch": 4, "init_lr": 0.1, "final_lr": 0.0, **keys}
    rates = load_recipe({"modifiers": [pruning, modifier("LearningRateFunctionModifier", **given)]}).rates
    assert {epoch: rates.at(epoch, 4) for epoch in expected} == pytest.approx(expected, abs=1e-9)
