"""Nothing that a model holds changes when it is looked at: norms in training mode, with parts of their own as well."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining import Pruning, count_macs, export_onnx, one_shot, save_pruned
from pruningawaretraining.patterns.labels.trace import trace

INPUTS = torch.randn(2, 3, 8, 8)


class NormAct(nn.BatchNorm2d):
    """A norm with an activation in it, as timm has."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Centred(nn.Module):
    """A container that counts its calls in training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.norm(x)


class Auxiliary(nn.Module):
    """A head that only training runs."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.Dropout(0.5))
        self.aux, self.head = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


class Plain(Auxiliary):
    """The same head in both modes; a layer in it never runs."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.first(x))
        return found


LOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "trace": lambda model: trace(model, INPUTS),
    "Pruning": lambda model: Pruning(model, {"rules": [{"target": {"macs": 0.6}, "start": 5}]}, example_inputs=INPUTS),
    "one_shot": lambda model: one_shot(model, {"layers": ["first.0"]}, [(INPUTS, None)], lambda a, b: a.sum(), [0.5]),
    "count_macs": lambda model: count_macs(model, INPUTS),
    "export_onnx": lambda model: export_onnx(model, INPUTS, "model.onnx"),
    "save_pruned": lambda model: save_pruned(model, "pruned.safetensors"),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("kind", [Auxiliary, Plain])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, NormAct, Centred], ids=lambda norm: norm.__name__)
def test_a_look_changes_nothing(
    norm: Any, kind: Any, look: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = kind(norm).train()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    drawn = torch.get_rng_state()
    LOOKS[look](model)
    after = model.state_dict()
    assert [name for name, values in before.items() if not torch.equal(values, after[name])] == []
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, NormAct, Centred], ids=lambda norm: norm.__name__)
def test_a_removal_keeps_the_statistics_of_what_stays(norm: Any) -> None:
    torch.manual_seed(0)
    model = Auxiliary(norm).train()
    pruner = Pruning(model, {"rules": [{"target": {"macs": 0.6}}]}, example_inputs=INPUTS)
    before = copy.deepcopy(model.state_dict())
    assert pruner.prune(model, 0) == "removed"
    (keep,) = pruner.masks.values()
    for name, values in model.state_dict().items():
        old = before[name]
        if not old.dim() or (name.startswith("first") and len(old) == 8):
            assert torch.equal(values, old[keep] if old.dim() else old), name
