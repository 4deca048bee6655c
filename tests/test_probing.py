"""Looking at a model leaves no trace, and what cannot be pruned is named with a reason."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Pruning
from pruningawaretraining.errors import ModelError
from pruningawaretraining.models.comparison import Comparison

HALF_OF = {"target": {"sparsity": 0.5}, "start": 0, "end": 1}
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
    line = LastChannel.between.__code__.co_firstlineno + 1
    assert f"in the model's own code (test_probing.py, line {line})" in caplog.text


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
    assert "a" not in pruner.masks and "a stays as it is: removed, some of it would leave another model" in caplog.text


def test_outputs_without_gradients_are_a_reason() -> None:
    with pytest.raises(ModelError, match=r"has no prunable channel group .* integers \(argmax\), or detached"):
        Pruning(made(Decides), RULE, example_inputs=example())


class Outputting(nn.Module):
    """Scales its hidden channels by their number, which a removal changes, and hides it behind its output."""

    def __init__(self, output: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.h, self.output = nn.Linear(8, 24), nn.Linear(24, 16), nn.Linear(16, 4), output

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.h(self.b(self.a(x).relu() * self.a.out_features**-0.5)))


CONSTANTS = {
    "a vector": lambda y: y * 0 + torch.arange(4.0, dtype=y.dtype),
    "zero": lambda y: y * 0,
    "one": lambda y: torch.ones_like(y) + 0 * y,
    "clamped": lambda y: y.clamp(-1e-9, 1e-9),
    "rounded": lambda y: (y * 1e-6).round(),
    "saturated": lambda y: torch.sigmoid(y * 1e9),
    "softmax over one": lambda y: y.sum(1, keepdim=True).softmax(1),
}


@pytest.mark.parametrize("kind", CONSTANTS)
def test_outputs_that_do_not_depend_on_the_groups_prove_nothing(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    Pruning(Outputting(CONSTANTS[kind]), {"rules": [{"layers": ["a"], **HALF_OF}]}, example_inputs=torch.randn(4, 8))
    assert "can be checked by the shapes of outputs alone" in caplog.text


@pytest.mark.parametrize("kind", ["as it is", "large"])
def test_outputs_that_depend_on_the_groups_show_what_is_misread(kind: str) -> None:
    model = Outputting((lambda y: y) if kind == "as it is" else (lambda y: y + 1e7))
    with pytest.raises(ModelError, match="a: removed, some of it would leave another model than masked"):
        Pruning(model, {"rules": [{"layers": ["a"], **HALF_OF}]}, example_inputs=torch.randn(4, 8))


class OfWords(nn.Module):
    """The mean over the words that an integer mask keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.b, self.h = nn.Embedding(10, 16), nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        y = self.e(ids)
        y = y + self.b(self.a(y).relu())
        return self.h((y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1))


@pytest.mark.parametrize(("kept", "said"), [(0, True), (1, False)])
def test_an_integer_mask_of_zeros_proves_nothing(kept: int, said: bool, caplog: pytest.LogCaptureFixture) -> None:
    ids = torch.zeros(2, 6, dtype=torch.long)
    Pruning(OfWords(), {"rules": [HALF_OF]}, example_inputs=(ids, torch.full_like(ids, kept)))
    assert ("integers and masks are taken as they are given" in caplog.text) is said
