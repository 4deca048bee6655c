"""Models as users bring them: inputs and outputs of any form, frozen, shared, repeated and parametrized layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining import Pruning, count_macs, load_pruned, save_pruned
from pruningawaretraining.models.calling import outputs_of

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8).sin()
LABELS = torch.tensor([0, 1])


class Body(nn.Module):
    """What every model here is made of: a stem, a layer that can be pruned, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 10, 3, padding=1)
        self.head = nn.Linear(10, 3)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.stem(x).relu()).relu().mean((2, 3)))

    def forward(self, x: Tensor) -> Any:
        return self.logits(x)


class TwoInputs(Body):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.logits(x) + self.logits(y)


class KeywordOnly(Body):
    def forward(self, *, image: Tensor, scale: float = 1.0) -> Tensor:
        return self.logits(image) * scale


class ListOfTensors(Body):
    def forward(self, images: list[Tensor]) -> Tensor:
        return self.logits(torch.stack(list(images)))


class Mapped(Body):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.logits(batch["image"])


class WithLoss(Body):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor | None]:
        logits = self.logits(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class OnlyLoss(Body):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.logits(x), labels)


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None
    names: tuple[str, ...] = ("a",)


class DataclassOutput(Body):
    def forward(self, x: Tensor) -> Output:
        return Output(self.logits(x))


class Named(NamedTuple):
    logits: Tensor
    extra: Tensor | None


class NamedOutput(Body):
    def forward(self, x: Tensor) -> Named:
        return Named(self.logits(x), None)


class NestedOutput(Body):
    def forward(self, x: Tensor) -> OrderedDict[str, Any]:
        return OrderedDict(out=[self.logits(x), None], meta={"n": 3})


class UsedTwice(Body):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(12, 12, 3, padding=1)

    def logits(self, x: Tensor) -> Tensor:
        x = self.again(self.again(self.stem(x)).relu())
        return self.head(self.inner(x.relu()).relu().mean((2, 3)))


class Auxiliary(Body):
    """A second classifier that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Sequential(nn.Conv2d(12, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(384, 3))

    def forward(self, x: Tensor) -> Any:
        logits = self.logits(x)
        return (logits, self.auxiliary(self.stem(x).relu())) if self.training else logits


FORMS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "tensor": (Body, X),
    "tuple": (TwoInputs, (X, X.flip(0))),
    "keywords": (KeywordOnly, {"image": X, "scale": 0.5}),
    "a list as one input": (ListOfTensors, ([X[0], X[1]],)),
    "a mapping as one input": (Mapped, ({"image": X},)),
    "a loss beside logits": (WithLoss, {"x": X, "labels": LABELS}),
    "None for a loss": (WithLoss, X),
    "a loss alone": (OnlyLoss, (X, LABELS)),
    "dataclass with None": (DataclassOutput, X),
    "named tuple with None": (NamedOutput, X),
    "nested": (NestedOutput, X),
    "a layer used twice": (UsedTwice, X),
    "an auxiliary classifier": (Auxiliary, X),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_pruned_saved_and_trained_on(name: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    build, inputs = FORMS[name]
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rule = {"target": {"sparsity": 0.5}, "scope": "local", "end": 1}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=inputs, optimizer=optimizer)
    pruner.prune(epoch=0)
    masked, dense = outputs_of(model, inputs), count_macs(build(), inputs)
    pruner.remove()
    removed = outputs_of(model, inputs)
    assert masked and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(masked, removed, strict=True))
    assert (model.stem.out_channels, model.inner.out_channels) == (9, 8)
    assert count_macs(model, inputs) == pruner.macs.kept < dense == pruner.macs.dense
    save_pruned(model, tmp_path / "model.safetensors")
    loaded = load_pruned(build(), tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(removed, outputs_of(loaded, inputs), strict=True))
    model.train()
    model.logits(X).square().mean().backward()
    optimizer.step()
    assert all(bool(torch.isfinite(one).all()) for one in model.parameters())


def test_frozen_layers_stay_frozen_and_follow() -> None:
    model = Body()
    model.stem.requires_grad_(False)
    pruner = Pruning(model, {"rules": [{"target": {"sparsity": 0.5}, "scope": "local"}]}, example_inputs=X)
    pruner.prune(epoch=0)
    assert model.stem.out_channels == 6 and not model.stem.weight.requires_grad
    assert model.inner.weight.shape == (5, 6, 3, 3) and model.inner.weight.requires_grad


def _shared() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    model[4].weight = model[2].weight
    return model


def _parametrized() -> nn.Module:
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), spectral, nn.ReLU(), nn.Linear(8, 10), nn.Linear(10, 2))


@pytest.mark.parametrize(
    ("build", "left_out", "reason"),
    [
        (_shared, "2", "its weight is shared with another module"),
        (_parametrized, "2", "its weight is parametrized"),
    ],
)
def test_what_cannot_be_sliced_is_left_out_by_name(build: Callable[[], nn.Module], left_out: str, reason: str) -> None:
    model, inputs = build(), torch.randn(4, 6)
    if build is _shared:
        with pytest.raises(ValueError, match=f"{left_out}: {reason}"):
            Pruning(model, {"rules": [{"target": {"sparsity": 0.5}}]}, example_inputs=inputs)
        return
    pruner = Pruning(model, {"rules": [{"target": {"sparsity": 0.5}}]}, example_inputs=inputs)
    assert reason in pruner.channel_pruner.found.skipped[left_out]
    pruner.prune(epoch=0)
    assert (model[2].out_features, model[4].out_features) == (8, 5)
