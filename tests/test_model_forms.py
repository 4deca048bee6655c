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
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.models.calling import outputs_of
from pruningawaretraining.optim import prune_param_groups

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


def test_a_shared_weight_is_left_out_by_name() -> None:
    with pytest.raises(ValueError, match="2: its weight is shared with another module"):
        Pruning(_shared(), {"rules": [{"target": {"sparsity": 0.5}}]}, example_inputs=torch.randn(4, 6))


class HalvedLinear(nn.Linear):
    """A layer that computes its weight of another tensor, by itself."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.twice = nn.Parameter(self.weight.detach() * 2)
        del self.weight

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        self.weight = self.twice / 2
        return super().forward(x_BI)


def _torch_pruned(layer: nn.Module) -> nn.Module:
    return nn.utils.prune.l1_unstructured(layer, "weight", 0.3)


P = nn.utils.parametrizations
COMPUTED: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "weight_norm": (P.weight_norm, "torch.nn.utils.parametrize.remove_parametrizations"),
    "spectral_norm": (P.spectral_norm, "torch.nn.utils.parametrize.remove_parametrizations"),
    "orthogonal": (P.orthogonal, "torch.nn.utils.parametrize.remove_parametrizations"),
    "old weight_norm": (nn.utils.weight_norm, "torch.nn.utils.remove_weight_norm"),
    "old spectral_norm": (nn.utils.spectral_norm, "torch.nn.utils.remove_spectral_norm"),
    "torch.nn.utils.prune": (_torch_pruned, "torch.nn.utils.prune.remove"),
    "its own code": (
        lambda layer: HalvedLinear(layer.in_features, layer.out_features),
        "computed in every forward pass",
    ),
}


@pytest.mark.filterwarnings("ignore:.*is deprecated in favor of:FutureWarning")
@pytest.mark.parametrize("pattern", ["channel", "2:4", "unstructured"])
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_is_computed_stays_and_its_reason_says_what_to_do(kind: str, pattern: str) -> None:
    torch.manual_seed(0)
    wrap, way = COMPUTED[kind]
    inputs = torch.randn(4, 6)
    layers = [nn.Linear(6, 8), nn.ReLU(), wrap(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 12), nn.Linear(12, 2)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruning(
        model,
        {"rules": [{"pattern": pattern, "target": {"sparsity": 0.5}}]},
        example_inputs=inputs,
        optimizer=optimizer,
    )
    for epoch in range(2):
        pruner.prune(model, epoch)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    assert bool(model(inputs).isfinite().all()) and model[2].weight.shape == (8, 8)
    if pattern == "channel":
        assert way in pruner.channel_pruner.found.skipped["2"] and model[4].out_features == 6
    else:
        assert float((model[4].weight == 0).float().mean()) > 0.3
    alone = nn.Sequential(wrap(nn.Linear(6, 8)))
    with pytest.raises(ModelError, match=f"0: its weight .*{way}"):
        Pruning(alone, {"rules": [{"pattern": pattern, "target": {"sparsity": 0.5}}]}, example_inputs=inputs)


@pytest.mark.filterwarnings("ignore:.*is deprecated in favor of:FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm"])
def test_a_weight_that_is_computed_from_later_on_is_named(kind: str) -> None:
    wrap, way = COMPUTED[kind]
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
    pruner = Pruning(model, {"rules": [{"target": {"sparsity": 0.5}, "end": 3}]}, example_inputs=torch.randn(4, 6))
    pruner.prune(model, 0)
    wrap(model[0])
    with pytest.raises(ModelError, match=f"0.weight: .* is gone from the .*: its weight is parametrized; {way}"):
        pruner.prune(model, 1)


@pytest.mark.filterwarnings("ignore:.*is deprecated in favor of:FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal", "old weight_norm", "old spectral_norm"])
def test_zeros_in_a_normalised_weight_are_refused(kind: str) -> None:
    """A channel of zeros is divided by its norm: NaN."""
    wrap, way = COMPUTED[kind]
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), wrap(nn.Linear(8, 8)))
    matrices = [one for one in model[2].named_parameters() if one[1].dim() > 1]
    name, parameter = max(matrices, key=lambda one: one[1].numel())
    lasso = {"group_type": "Dim0Grouper", "prox_type": "ProxGroupLasso", "reg_lambda": 0.1}
    for key in (f"2.{name}", ":.*"):
        with pytest.raises(ConfigError, match=f"zeros in it would become NaN: its weight is parametrized; {way}"):
            prune_param_groups(model, {key: lasso})
    groups = prune_param_groups(model, {f"2.{name}": {"lr": 0.1}, "0.weight": lasso})
    assert groups[0]["params"] == [parameter]
