"""Several pruners of one model, one after another: where one removes channels, the masks of all others go on."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_books import INPUTS, RULES, assert_masked, build, step
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pruningawaretraining import Pruning

INSIDE = [name for name in RULES if name != "channel"]


def pruner_of(model: nn.Module, optimizer: torch.optim.Optimizer, pattern: str, **options: Any) -> Pruning:
    given = {name: options.pop(name) for name in ("ema",) if name in options}
    rule = {**RULES[pattern], "name": pattern, **options}
    return Pruning(model, {"rules": [rule]}, example_inputs=INPUTS, optimizer=optimizer, **given)


def masked_and_ended(model: nn.Sequential, optimizer: torch.optim.Optimizer, **options: Any) -> Pruning:
    """A pruner that has masked channels when its training ends early; none is removed."""
    pruner = pruner_of(model, optimizer, "channel", **options)
    for epoch in range(6):
        pruner.prune(model, epoch)
        step(model, optimizer)
    pruner.on_train_end()
    return pruner


def finished(model: nn.Sequential, optimizer: torch.optim.Optimizer, pattern: str, **options: Any) -> Pruning:
    """A pruner inside layers that has met its target."""
    pruner = pruner_of(model, optimizer, pattern, end=0, **options)
    pruner.prune(model, 0)
    step(model, optimizer)
    return pruner


def elements_then_channels(model: nn.Sequential, optimizer: torch.optim.Optimizer, pattern: str) -> list[Pruning]:
    first = finished(model, optimizer, pattern)
    second = pruner_of(model, optimizer, "channel", end=0)
    return [first, second]


def channels_then_elements(model: nn.Sequential, optimizer: torch.optim.Optimizer, pattern: str) -> list[Pruning]:
    first = masked_and_ended(model, optimizer)
    return [finished(model, optimizer, pattern), first]


def one_between_is_gone(model: nn.Sequential, optimizer: torch.optim.Optimizer, pattern: str) -> list[Pruning]:
    first = finished(model, optimizer, pattern)
    between = finished(model, optimizer, "2:4", layers=["4"])
    del between
    gc.collect()
    return [first, pruner_of(model, optimizer, "channel", end=0)]


def an_early_end(model: nn.Sequential, optimizer: torch.optim.Optimizer, pattern: str) -> list[Pruning]:
    first = pruner_of(model, optimizer, pattern)
    for epoch in range(6):
        first.prune(model, epoch)
        step(model, optimizer)
    first.on_train_end()
    return [first, pruner_of(model, optimizer, "channel", end=0)]


def act(pruner: Pruning, model: nn.Module) -> None:
    """Remove channels, by an event or by hand."""
    if pruner.phase == "regularize":
        assert pruner.prune(model, 0) == "removed"
    else:
        pruner.remove()


@pytest.mark.parametrize("pattern", INSIDE)
@pytest.mark.parametrize("order", [elements_then_channels, channels_then_elements, one_between_is_gone, an_early_end])
def test_masks_of_another_pruner_are_sliced_by_a_removal(
    order: Callable[[nn.Sequential, torch.optim.Optimizer, str], list[Pruning]], pattern: str
) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    other, removing = order(model, optimizer, pattern)
    known: dict[str, Tensor] = {}
    for masks in other.engine.masks:
        for member, keep_W in masks.grouping.expand(masks.keep_G.float(), 1.0):
            weight = model.get_parameter(member.name)
            known[member.name] = (keep_W == 0).expand(weight.shape)
            vars(weight)["mark"] = torch.arange(weight.numel()).view(weight.shape)
            with torch.no_grad():
                optimizer.state[weight]["mark"] = torch.arange(1.0, weight.numel() + 1).view(weight.shape)
    before = {name: int(one.sum()) for name, one in known.items()}
    act(removing, model)
    assert sum(one.numel() for one in model.parameters()) < sum(one.numel() for one in build().parameters())
    expected = {}
    for name, gone in known.items():  # an optimizer's state shows which entries of a weight are left
        left = optimizer.state[model.get_parameter(name)]["mark"].long() - 1
        expected[name] = gone.flatten()[left.flatten().clamp(min=0)].view(left.shape) & (left >= 0)
    assert sum(int(one.sum()) for one in expected.values()) > 0
    for _ in range(3):
        step(model, optimizer)
    assert_masked(other, model)
    for name, gone in expected.items():
        weight = model.get_parameter(name)
        assert not bool(weight[gone].any()), name
        assert not bool(optimizer.state[weight]["momentum_buffer"][gone].any()), name
        assert bool(weight[~gone].any()), name
    masked = sum(masks.masked_weights() for masks in other.engine.masks)
    assert masked == sum(int(one.sum()) for one in expected.values()) < sum(before.values())
    with torch.no_grad():
        for one in model.parameters():
            one.add_(1.0)
    other.apply_masks()
    assert_masked(other, model)


@pytest.mark.parametrize("by_hand", [False, True])
def test_masked_channels_of_another_pruner_follow(by_hand: bool) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    first = masked_and_ended(model, optimizer, layers=["0"])
    masked = int((~first.masks["0"]).sum())
    second = pruner_of(model, optimizer, "channel", end=0, layers=["2.0"], name="second")
    if by_hand:
        second.remove_channels({"2.0": [1, 2]})
    else:
        assert second.prune(model, 0) == "removed"
    for _ in range(2):
        step(model, optimizer)
    first.apply_masks()
    assert_masked(first, model)
    assert masked > 0 and int((~first.masks["0"]).sum()) == masked
    outputs = model.eval()(INPUTS)
    first.remove()
    assert model[0].out_channels == 8 - masked
    torch.testing.assert_close(model(INPUTS), outputs)
    second.apply_masks()
    assert second.engine.coupled is not None
    left = {one.name: one.parameter for one in second.engine.coupled.found.grouping.members}
    assert left["2.0.weight"] is model[2][0].weight


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_averages_of_another_pruner_are_sliced_and_masked(pattern: str) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    average = [AveragedModel(model)]
    first = finished(model, optimizer, pattern, ema=average)
    assert pruner_of(model, optimizer, "channel", end=0).prune(model, 0) == "removed"
    step(model, optimizer)
    average[0].update_parameters(model)
    assert_masked(first, average[0].module)


def test_a_rule_with_events_to_come_decides_again_on_what_is_left() -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    first = masked_and_ended(model, optimizer)
    second = pruner_of(model, optimizer, "2:4", end=4)
    for epoch in range(3):
        second.prune(model, epoch)
        step(model, optimizer)
    first.remove()
    assert 0 < second.sparsity < 0.5
    for epoch in range(3, 6):
        second.prune(model, epoch)
        step(model, optimizer)
    assert_masked(second, model)
    assert second.phase == "finetune"
