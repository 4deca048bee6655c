"""Criteria that listen to training, on whole channels: what they hear decides, follows removals and is saved."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Pruning
from pruningawaretraining.criteria.base import collector_of
from pruningawaretraining.errors import ModelError
from pruningawaretraining.registry import build, names

WIDTH, IDLE = 8, (2, 5)
LISTENING = [
    name
    for name in names("criterion")
    if collector_of(build("criterion", name)) is not None
    and name not in ("block_change", "reap")  # test_depth.py and test_experts.py have them
]


def network() -> nn.Module:
    """Two channels have large weights but never fire: only who listens knows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))
    with torch.no_grad():
        for channel in IDLE:
            model[0].weight[channel] *= 3
            model[0].bias[channel] = -100.0
            model[2].weight[:, channel] *= 3
    return model


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)


def rule(criterion: Any, **options: Any) -> dict[str, Any]:
    return {
        "rules": [
            {
                "criterion": criterion, "layers": ["0"], "schedule": "linear", "start": 0, "end": 1,
                "target": {"sparsity": len(IDLE) / WIDTH}, **options,
            }
        ]
    }  # fmt: skip


def train(pruner: Pruning, model: nn.Module, optimizer: torch.optim.Optimizer, epochs: range) -> None:
    for epoch in epochs:
        for step in range(3):
            inputs, targets = data(10 * epoch + step)
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        pruner.prune(model, epoch)


def started(criterion: Any, **options: Any) -> tuple[Pruning, nn.Module, torch.optim.Optimizer]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Pruning(model, rule(criterion, **options), example_inputs=data()[0], optimizer=optimizer), model, optimizer


@pytest.mark.parametrize("application", ["mask", "remove"])
@pytest.mark.parametrize("criterion", LISTENING)
def test_every_listening_criterion_prunes_channels_on_a_schedule(criterion: str, application: str) -> None:
    pruner, model, optimizer = started(criterion, application=application)
    train(pruner, model, optimizer, range(1))
    assert pruner.sparsity == 1 / WIDTH
    train(pruner, model, optimizer, range(1, 3))
    assert (model[0].out_features, model[2].in_features, pruner.phase) == (WIDTH - 2, WIDTH - 2, "finetune")
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    assert hooks == 0, "nothing listens once the target is met"


@pytest.mark.parametrize("criterion", ["snip", "snip_momentum", "taylor", "obs", "cap"])
def test_channels_that_never_fire_go_first_however_large_they_are(criterion: str) -> None:
    pruner, model, optimizer = started(criterion)
    train(pruner, model, optimizer, range(2))
    assert torch.nonzero(~pruner.masks["0"]).flatten().tolist() == list(IDLE)
    by_size, twin, other = started("magnitude")
    train(by_size, twin, other, range(2))
    assert bool(by_size.masks["0"][list(IDLE)].all()), "by size they stay"


@pytest.mark.parametrize("criterion", ["snip", "taylor", "obs"])
def test_data_of_its_own_does_for_a_criterion_what_training_would(criterion: str) -> None:
    pruner, model, _ = started({"type": criterion, "num_grads": 8} if criterion == "obs" else criterion, end=0)
    pruner.calibrate_with([data(seed) for seed in range(8)], functional.cross_entropy)
    before = copy.deepcopy(model.state_dict())
    pruner.prune(model, 0)
    assert torch.nonzero(~pruner.masks["0"]).flatten().tolist() == list(IDLE)
    kept = [channel for channel in range(WIDTH) if channel not in IDLE]
    assert torch.equal(model[0].weight, before["0.weight"][kept])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_a_step_or_data_there_is_nothing_to_score_by() -> None:
    pruner, model, _ = started("snip")
    with pytest.raises(
        ModelError, match=r"rules\[0\].criterion: Snip\w* listens to training, and no step has been taken"
    ):
        pruner.prune(model, 0)
    assert pruner.sparsity == 0


@pytest.mark.parametrize("application", ["mask", "remove"])
@pytest.mark.parametrize("criterion", ["snip_momentum", "wanda", "obs", "variance"])
def test_a_resumed_run_has_heard_what_the_uninterrupted_one_has(criterion: str, application: str) -> None:
    options = {"layers": ["0", "2"], "target": {"sparsity": 0.5}, "end": 3, "application": application}
    whole, model, optimizer = started(criterion, **options)
    train(whole, model, optimizer, range(4))

    first, half, half_optimizer = started(criterion, **options)
    train(first, half, half_optimizer, range(2))
    state, weights, momenta = first.state_dict(), half.state_dict(), half_optimizer.state_dict()
    again, resumed, resumed_optimizer = started(criterion, **options)
    again.load_state_dict(state)
    resumed.load_state_dict(weights)
    resumed_optimizer.load_state_dict(momenta)
    train(again, resumed, resumed_optimizer, range(2, 4))
    for name, keep in whole.masks.items():
        assert torch.equal(keep, again.masks[name])
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
