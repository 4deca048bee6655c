"""Pruning on in another session: from a file with a lower target, in every form, as on a live model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_models import build as build_attention
from test_books import INPUTS, build, step
from torch import nn

from pruningawaretraining import Pruning, count_macs, load_pruned, save_pruned

FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "channels, sparsity": ({"pattern": "channel", "target": {"sparsity": 0.25}}, {"sparsity": 0.5}),
    "channels, macs": ({"pattern": "channel", "target": {"macs": 0.7}}, {"macs": 0.4}),
    "channels, parameters": ({"pattern": "channel", "target": {"parameters": 0.7}}, {"parameters": 0.4}),
    "slices": ({"pattern": {"type": "slice", "block_size": 2}, "target": {"sparsity": 0.25}}, {"sparsity": 0.5}),
    "4x1": ({"pattern": "4x1", "target": {"sparsity": 0.25}}, {"sparsity": 0.5}),
    "2:4": ({"pattern": "2:4", "target": {"sparsity": 0.25}}, {"sparsity": 0.5}),
    "unstructured": ({"pattern": "unstructured", "target": {"sparsity": 0.5}}, {"sparsity": 0.8}),
}


def reached(model: nn.Module, pruner: Pruning, target: dict[str, float], dense: nn.Module) -> None:
    """The target holds, of the dense model, and not by far."""
    if "sparsity" in target:
        assert pruner.sparsity == pytest.approx(target["sparsity"], abs=0.06)
        assert pruner.report().sparsity == pruner.sparsity
    if "macs" in target:
        fraction = count_macs(model, INPUTS) / count_macs(dense, INPUTS)
        assert target["macs"] - 0.15 < fraction <= target["macs"]
        assert pruner.macs.fraction == pytest.approx(fraction)
    if "parameters" in target:
        sizes = [sum(one.numel() for one in each.parameters()) for each in (model, dense)]
        assert target["parameters"] - 0.15 < sizes[0] / sizes[1] <= target["parameters"]
        assert pruner.report().parameters["fraction"] == pytest.approx(sizes[0] / sizes[1])


def prune(model: nn.Module, rule: dict[str, Any], inputs: Any = INPUTS) -> Pruning:
    """A whole training: dense steps, two events, and steps after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = Pruning(model, {"rules": [{**rule, "end": 1}]}, example_inputs=inputs, optimizer=optimizer)
    for epoch in range(3):
        pruner.prune(model, epoch)
        if inputs is INPUTS:
            step(model, optimizer)
    pruner.on_train_end()
    return pruner


def from_a_file(model: nn.Module, folder: Path) -> nn.Module:
    return load_pruned(build(), save_pruned(model, folder / "first.safetensors"))


def from_a_pickle(model: nn.Module, folder: Path) -> nn.Module:
    torch.save(model, folder / "whole.pt")
    return torch.load(folder / "whole.pt", weights_only=False)


def from_a_copy(model: nn.Module, folder: Path) -> nn.Module:
    return copy.deepcopy(model)


def from_itself(model: nn.Module, folder: Path) -> nn.Module:
    return model


@pytest.mark.parametrize("again", [from_a_file, from_a_pickle, from_a_copy, from_itself])
@pytest.mark.parametrize("form", FORMS)
def test_a_pruned_model_is_pruned_on_and_not_anew(form: str, again: Any, tmp_path: Path) -> None:
    """The same target has nothing to do, a lower one is one of the dense model: however the model came here."""
    rule, lower = FORMS[form]
    model, dense = build(), build()
    reached_first = prune(model, rule).sparsity
    zeros = {name: one == 0 for name, one in model.named_parameters() if name.endswith("weight")}
    shapes = {name: one.shape for name, one in model.named_parameters()}
    model = again(model, tmp_path)
    same = prune(model, rule)
    assert same.sparsity == pytest.approx(reached_first)
    assert {name: one.shape for name, one in model.named_parameters()} == shapes
    second = prune(model, {**rule, "target": lower})
    reached(model, second, lower, dense)
    assert second.sparsity > reached_first + 0.1
    if rule["pattern"] != "channel":  # what was pruned stays so
        assert all(bool((one[zeros[name]] == 0).all()) for name, one in model.named_parameters() if name in zeros)


@pytest.mark.parametrize("form", FORMS)
def test_a_lower_target_goes_on_from_a_file(form: str, tmp_path: Path) -> None:
    rule, lower = FORMS[form]
    model, dense = build(), build()
    first = prune(model, rule)
    reached(model, first, rule["target"], dense)
    zeros = {name: one == 0 for name, one in model.named_parameters() if name.endswith("weight")}
    path = save_pruned(model, tmp_path / "first.safetensors")

    same = load_pruned(build(), path)
    again = prune(same, rule)
    assert again.sparsity == pytest.approx(first.sparsity)
    assert {n: p.shape for n, p in same.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}

    loaded = load_pruned(build(), path)
    second = prune(loaded, {**rule, "target": lower})
    reached(loaded, second, lower, dense)
    assert second.sparsity > first.sparsity + 0.1
    if rule["pattern"] != "channel":  # what was pruned stays so
        assert all(bool((one[zeros[name]] == 0).all()) for name, one in loaded.named_parameters() if name in zeros)

    third = load_pruned(build(), save_pruned(loaded, tmp_path / "second.safetensors"))
    last = prune(third, {**rule, "target": lower})
    assert last.sparsity == pytest.approx(second.sparsity)
    assert {n: p.shape for n, p in third.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}


def test_heads_go_on_from_a_file(tmp_path: Path) -> None:
    model, inputs = build_attention("encoder")
    rule = {"pattern": "head", "target": {"sparsity": 0.25}, "scope": "local"}
    first = prune(model, rule, inputs)
    assert first.sparsity == pytest.approx(0.25)
    loaded = load_pruned(build_attention("encoder")[0], save_pruned(model, tmp_path / "m.safetensors"))
    second = prune(loaded, {**rule, "target": {"sparsity": 0.5}}, inputs)
    assert second.sparsity == pytest.approx(0.5)
    sizes = {name: one.numel() for name, one in model.named_parameters()}
    smaller = [name for name, one in loaded.named_parameters() if one.numel() < sizes[name]]
    assert any("in_proj_weight" in name for name in smaller), smaller


def test_another_pattern_begins_anew_on_the_zeros_of_a_file(tmp_path: Path) -> None:
    model = build()
    prune(model, {"pattern": "unstructured", "target": {"sparsity": 0.5}})
    loaded = load_pruned(build(), save_pruned(model, tmp_path / "m.safetensors"))
    prune(loaded, {"pattern": "2:4", "target": {"sparsity": 0.5}})
    rows = loaded[2][0].weight.movedim(1, -1).reshape(-1, 4)
    assert bool(((rows != 0).sum(1) <= 2).all())


PER_LAYER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "channels": ({"sparsity_per_layer": {"0": 0.25}}, {"sparsity_per_layer": {"0": 0.5}}),
    "channels that stay": ({"keep_per_layer": 6}, {"keep_per_layer": 4}),
    "unstructured": (
        {"pattern": "unstructured", "sparsity_per_layer": {"0": 0.25, "2.0": 0.5}},
        {"pattern": "unstructured", "sparsity_per_layer": {"0": 0.75, "2.0": 0.5}},
    ),
}


@pytest.mark.parametrize("form", PER_LAYER)
def test_lower_fractions_of_layers_go_on_from_a_file(form: str, tmp_path: Path) -> None:
    rule, lower = PER_LAYER[form]
    model, at_once = build(), build()
    prune(model, rule)
    path = save_pruned(model, tmp_path / "m.safetensors")
    prune(at_once, lower)

    same = load_pruned(build(), path)
    prune(same, rule)
    assert [(one.shape, int((one == 0).sum())) for one in same.parameters()] == [
        (one.shape, int((one == 0).sum())) for one in model.parameters()
    ]
    loaded = load_pruned(build(), path)
    prune(loaded, lower)
    assert [(one.shape, int((one == 0).sum())) for one in loaded.parameters()] == [
        (one.shape, int((one == 0).sum())) for one in at_once.parameters()
    ]


INSIDE = {"pattern": "unstructured", "target": {"sparsity": 0.5}}


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ([{**INSIDE, "target": {"sparsity": 0.8}}], False),
        ([{"target": {"macs": 0.7}}], True),
        ([{"target": {"macs": 0.7}}, INSIDE], False),
        ([{**INSIDE, "name": "another"}], False),
        ([{**INSIDE, "name": "another", "mode": "unprune"}], True),
        ([{**INSIDE, "pattern": "2:4"}], True),
        ([{"target": {"macs": 0.7}}, {"pattern": "unstructured", "mode": "lock"}], False),
    ],
)
def test_zeros_of_a_file_that_no_rule_keeps_are_said(
    rules: list[dict[str, Any]], told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    prune(model, INSIDE)
    loaded = load_pruned(build(), save_pruned(model, tmp_path / "m.safetensors"))
    caplog.clear()
    Pruning(loaded, {"rules": rules}, example_inputs=INPUTS)
    assert ("its zeros may come back" in caplog.text) == told


@pytest.mark.parametrize("rules", [[{"name": "another"}], [{"target": {"macs": 0.7}, "end": 1}, {}]])
@pytest.mark.parametrize("target", [0.5, 0.8])
def test_a_rule_of_another_name_or_position_keeps_the_zeros_of_its_pattern(
    target: float, rules: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = build()
    prune(model, INSIDE)
    zeros = model[4].weight == 0  # no channel of its inputs is told from these by name
    loaded = load_pruned(build(), save_pruned(model, tmp_path / "m.safetensors"))
    own = {**INSIDE, "target": {"sparsity": target}, "end": 1}
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.05)
    config = {"rules": [{**own, **rule} if "target" not in rule else rule for rule in rules]}
    pruner = Pruning(loaded, config, example_inputs=INPUTS, optimizer=optimizer)
    step(loaded, optimizer)
    assert bool((loaded[4].weight[zeros] == 0).all())
    for epoch in range(3):
        pruner.prune(loaded, epoch)
        step(loaded, optimizer)
    weights = [one for name, one in loaded.named_parameters() if name.endswith("weight") and one.dim() > 1]
    fraction = sum(int((one == 0).sum()) for one in weights) / sum(one.numel() for one in weights)
    assert fraction == pytest.approx(target, abs=0.06)


def test_what_targets_are_fractions_of_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="pruningawaretraining")
    model = build()
    prune(model, {"target": {"macs": 0.7}})
    assert "as this pruner found it" not in caplog.text and "pruned before" not in caplog.text
    prune(model, {"target": {"macs": 0.5}})
    assert "of the MACs of the model as this pruner found it" in caplog.text and "pruned before" not in caplog.text
    caplog.clear()
    prune(model, {"target": {"macs": 0.5}})
    warnings = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert any(one.startswith("rules[0]: the model was pruned before and meets the target") for one in warnings)
