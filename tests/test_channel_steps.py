"""Channel rules that count steps: when their events are, with explicit hooks and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pruningawaretraining import Pruning

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8).sin()
RULE = {"unit": "step", "start": 2, "end": 6, "every": 2, "target": {"sparsity": 0.5}, "scope": "local"}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 3), nn.AdaptiveAvgPool2d(1))


def train(pruner: Pruning, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, hooks: bool) -> list[int]:
    """Channels that are kept after every step."""
    kept = []
    for step in steps:
        if hooks:
            pruner.on_step_begin(step)
        optimizer.zero_grad()
        model(X).square().mean().backward()
        if hooks:
            pruner.on_before_optimizer_step()
        optimizer.step()
        if hooks:
            pruner.on_after_optimizer_step()
        kept.append(int(pruner.masks["0"].sum()))
    return kept


@pytest.mark.parametrize("hooks", [True, False], ids=["hooks", "found by itself"])
@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # Sparsities 1/6, 1/3 and 1/2 of 12 channels before steps 2, 4 and 6; the last one already after the sixth step.
        ({}, [12, 12, 10, 10, 8, 6, 6, 6]),
        ({"start": 0, "end": 0}, [6, 6, 6, 6, 6, 6, 6, 6]),
        ({"criterion": "snip", "start": 0, "end": 0}, [6, 6, 6, 6, 6, 6, 6, 6]),
        ({"criterion": "snip"}, [12, 12, 10, 10, 8, 6, 6, 6]),
        ({"application": "remove"}, [12, 12, 10, 10, 8, 6, 6, 6]),
        ({"unit": "epoch"}, [12] * 8),
    ],
    ids=str,
)
def test_events_come_with_steps(hooks: bool, rule: dict[str, Any], expected: list[int]) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    pruner = Pruning(model, {"rules": [{**RULE, **rule}]}, example_inputs=X)
    assert train(pruner, model, optimizer, range(8), hooks) == expected
    assert model[0].out_channels == expected[-1]
    assert {id(one) for one in model.parameters()} == {id(one) for one in optimizer.param_groups[0]["params"]}
    assert pruner.phase == ("regularize" if rule.get("unit") == "epoch" else "finetune")


def test_accumulated_passes_are_one_step() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruner = Pruning(model, {"rules": [RULE]}, example_inputs=X)
    kept = []
    for step in range(14):
        model(X).square().mean().backward()
        if step % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()
            kept.append(int(pruner.masks["0"].sum()))
    assert kept == [12, 12, 10, 10, 8, 6, 6]


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 7])
def test_a_run_that_is_resumed_in_between_ends_alike(stop: int) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, Pruning]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, Pruning(model, {"rules": [RULE]}, example_inputs=X, optimizer=optimizer)

    model, optimizer, pruner = start()
    kept = train(pruner, model, optimizer, range(8), False)
    first, first_optimizer, first_pruner = start()
    begun = train(first_pruner, first, first_optimizer, range(stop), False)
    second, second_optimizer, second_pruner = start()
    second_pruner.load_state_dict(first_pruner.state_dict())
    second.load_state_dict(first.state_dict())
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    assert begun + train(second_pruner, second, second_optimizer, range(stop, 8), False) == kept
    for one, other in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
