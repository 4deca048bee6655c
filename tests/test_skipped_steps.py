"""Steps that a gradient scaler lets a fused optimizer skip: only the device knows which; nothing may go by a wrong
count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining import Pruning
from pruningawaretraining.session.optimizer_hooks import Steps

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8).sin()
STEPS = 9
CHANNELS = {"unit": "step", "start": 2, "end": 6, "every": 2, "target": {"sparsity": 0.5}, "scope": "local"}
BLOCKS = {**CHANNELS, "pattern": "4x1", "regularizer": {"type": "block_lasso", "strength": 0.5}}
AT_EVENTS = [(2,), (1, 2, 5)]
"""Skipped steps that would have had an event: the next forward pass is masked already, so weights are not the same."""
PARTS = {**CHANNELS, "pattern": "unstructured", "progressive": 2}


def trained(rule: dict[str, Any], fused: bool, overflow: tuple[int, ...]) -> tuple[list[int], int, list[Tensor]]:
    """How many weights are 0 after every real step of a training, how many of these there were, and its weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 3), nn.AdaptiveAvgPool2d(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused, foreach=False)
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=X[:1], optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    seen = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(X).square().mean() * (float("inf") if step in overflow else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step not in overflow:  # an event comes before its step, also before one that is skipped then
            seen.append(sum(int((one == 0).sum()) for one in model.parameters()))
    return seen, pruner.steps, [one.detach() for one in model.parameters()]


@pytest.mark.parametrize("overflow", [(), (0,), (1,), (1, 4), *AT_EVENTS], ids=str)
@pytest.mark.parametrize("rule", [CHANNELS, BLOCKS, PARTS], ids=["channels", "blocks", "parts"])
def test_events_and_penalties_are_those_of_an_optimizer_that_is_not_called(
    rule: dict[str, Any], overflow: tuple[int, ...]
) -> None:
    found, steps, weights = trained(rule, True, overflow)
    expected, _, others = trained(rule, False, overflow)
    assert found == expected and max(found) > 0
    assert steps == STEPS - len(overflow)
    for mine, theirs in zip(weights, others, strict=True) if overflow not in AT_EVENTS and rule is not PARTS else ():
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)


class Silent:
    """A listener of steps that does nothing."""

    def on_round(self) -> None: ...
    def on_gradients(self, scale: Tensor | float, only: set[int] | None) -> None: ...
    def on_moved(self) -> None: ...
    def on_stepped(self) -> None: ...

    masks: tuple[()] = ()


def test_what_is_known_without_asking_the_device() -> None:
    model, silent = nn.Linear(2, 2), Silent()
    steps = Steps(model, silent)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps.attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert (steps.counts, steps.fresh) == (range(1, 2), 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    steps.attach(optimizer)
    steps.end_round()
    for number, skips in enumerate((True, False, True), start=1):
        optimizer.found_inf = torch.tensor(float(skips))
        optimizer.step()
        assert steps.counts == range(1, 2 + number)
        assert int(steps.fresh) == 1 - skips
    assert steps.count == 2
    assert steps.counts == range(2, 3)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert steps.counts == range(2, 4)
    assert steps.count == 3 and steps.counts == range(3, 4)
