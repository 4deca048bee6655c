"""Looking at a model leaves no trace, and what cannot be pruned is named with a reason."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Pruning
from pruningawaretraining.errors import ModelError
from pruningawaretraining.models.comparison import Comparison

RULE = {"rules": [{"target": {"macs": 0.6}, "start": 0, "end": 0}]}


class Net(nn.Module):
    """Convolutions around something that a subclass does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 10)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(torch.relu(self.a(x)))
        return self.head(torch.relu(self.b(x)).mean((2, 3)))


class Draws(Net):
    def between(self, x: Tensor) -> Tensor:
        return functional.dropout(x, 0.1, True) + 0 * torch.randn(1)


class LastChannel(Net):
    def between(self, x: Tensor) -> Tensor:
        return x + x[:, -1:]


class Blurs(Net):
    """A depthwise blur with a kernel made in float32 at every call, by whatever number of channels there are."""

    def between(self, x: Tensor) -> Tensor:
        kernel = torch.ones(x.shape[1], 1, 3, 3) / 9
        return functional.conv2d(x, kernel, padding=1, groups=x.shape[1])


class Leaks(Blurs):
    """The same, and a little of the mean over all channels in each."""

    def between(self, x: Tensor) -> Tensor:
        return super().between(x) - 1e-3 * torch.arange(1.0, 1 + x.shape[1])[:, None, None] * x.mean(1, keepdim=True)


class Decides(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(1)


def made(kind: type[Net]) -> Net:
    torch.manual_seed(0)
    return kind()


def example() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_random_generators_are_as_before_construction_and_removal() -> None:
    model = made(Draws)
    before = torch.get_rng_state()
    pruner = Pruning(model, RULE, example_inputs=example())
    pruner.report()
    pruner.prune(model, 0)
    assert pruner.macs.fraction <= 0.6
    assert torch.equal(torch.get_rng_state(), before)


def test_a_slice_from_the_end_leaves_its_layer_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pruningawaretraining"):
        pruner = Pruning(made(LastChannel), {"rules": [{"target": {"sparsity": 0.5}}]}, example_inputs=example())
    assert set(pruner.masks) == {"b"}
    assert "a stays as it is: is cut at a place that the code states" in caplog.text
    assert "in the model's own code (test_probing.py, line 42)" in caplog.text


@pytest.mark.parametrize(("kind", "exact"), [(Net, False), (Blurs, True)])
def test_constants_made_in_float32_do_not_keep_a_comparison_from_float64(kind: Any, exact: bool) -> None:
    model, before = made(kind), torch.get_default_dtype()
    comparison = Comparison(model, example())
    assert comparison.outputs().exact
    assert comparison._wide is exact
    assert torch.get_default_dtype() is before


def test_a_leak_beside_such_constants_is_found(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pruningawaretraining"):
        pruner = Pruning(made(Leaks), {"rules": [{"target": {"sparsity": 0.5}}]}, example_inputs=example())
    assert (
        "a" not in pruner.masks and "a stays as it is: reaches a mean over channels in the model's own" in caplog.text
    )


def test_outputs_without_gradients_are_a_reason() -> None:
    with pytest.raises(ModelError, match=r"has no prunable channel group .* integers \(argmax\), or detached"):
        Pruning(made(Decides), RULE, example_inputs=example())
