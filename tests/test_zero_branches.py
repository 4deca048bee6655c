"""Branches that start at zero: what a dry run would not see at the initial weights is found before training."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Pruning
from pruningawaretraining.masks.masks import Masks
from pruningawaretraining.masks.partial_removal import removable_part
from pruningawaretraining.models.calling import outputs_of
from pruningawaretraining.models.comparison import Comparison
from pruningawaretraining.models.probes import perturbed
from pruningawaretraining.patterns.channel import find_channels
from pruningawaretraining.patterns.channel_labels import producer_names

RULE = {"rules": [{"target": {"sparsity": 0.4}, "start": 1, "end": 2}]}


class Weighs(nn.Module):
    """A residual branch that weighs its channels by their number; as much of it as a factor lets through."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, 12, 3, padding=1), nn.Conv2d(12, width, 3, padding=1)
        self.gamma = nn.Parameter(torch.full((1, width, 1, 1), start))

    def branch(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(functional.gelu(x * torch.linspace(0.5, 2, x.shape[1])[:, None, None]))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.branch(x)


class ZeroNorm(Weighs):
    """The same behind a norm whose weight starts at zero."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__(width, start)
        del self.gamma
        self.norm = nn.BatchNorm2d(width)
        nn.init.constant_(self.norm.weight, start)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.branch(x))


class ZeroConv(ZeroNorm):
    """The same with a last convolution of zeros."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__(width, 1.0)
        nn.init.constant_(self.b.weight, start)
        nn.init.zeros_(self.b.bias)


def net(kind: type[Weighs], start: float) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), kind(8, start), nn.ReLU(), nn.Conv2d(8, 4, 1))


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("start", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize("kind", [Weighs, ZeroNorm, ZeroConv])
def test_a_branch_that_starts_at_zero_is_understood_before_training(
    kind: type[Weighs], start: float, caplog: pytest.LogCaptureFixture
) -> None:
    model = net(kind, start)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    with caplog.at_level(logging.WARNING):
        pruner = Pruning(model, RULE, example_inputs=images(), optimizer=optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(pruner.masks) == {"0"}
    assert "1.a stays as it is: removed, some of it would leave another model than masked" in caplog.text
    for epoch in range(3):
        for _ in range(5):
            optimizer.zero_grad()
            model(images(4)).square().mean().backward()
            optimizer.step()
        pruner.prune(model, epoch)
    assert pruner.phase == "finetune" and model[0].out_channels == 5 and model[1].a.out_channels == 12


def test_perturbed_weights_are_put_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    nn.init.zeros_(model[2].weight)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt), perturbed(model):
        assert torch.equal(model[0].weight, before["0.weight"])
        norm = model[1].weight.detach()
        assert bool(((norm >= 0.5) & (norm <= 1.5)).all()) and len(norm.unique()) == 4
        assert bool((model[2].weight != 0).all())
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def _found(model: nn.Module) -> Any:
    return find_channels(model, images(), set(producer_names(model)))


def test_of_a_removal_that_does_not_compare_the_rest_can_go() -> None:
    model = net(Weighs, 1.0)
    found = _found(model)
    names = [one.name for one in found.grouping.sets]
    assert names == ["0", "1.a"]
    keep_G = torch.ones(found.grouping.size, dtype=torch.bool)
    keep_G[::3] = False
    masks = Masks.coupled(model, found)
    masks.set(keep_G)
    comparison = Comparison(model, images())
    masked, weights = comparison.outputs(), copy.deepcopy(model.state_dict())
    masks.clear()
    part_G, reasons = removable_part(model, found, keep_G, comparison, masked)
    assert reasons.keys() == {"1.a"} and "would change the outputs by" in reasons["1.a"]
    assert torch.equal(part_G[:8], keep_G[:8]) and bool(part_G[8:].all())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert float((outputs_of(model, comparison.inputs)[0] - masked.tensors[0]).abs().max()) <= 1e-5
