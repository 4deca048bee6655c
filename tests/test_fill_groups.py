"""Zeroing chosen groups in place: the compiled pass does what PyTorch's operation does, on every kind of label."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining.groups import kernels as fused
from pruningawaretraining.groups.views import fill_groups, fold_of
from pruningawaretraining.masks.view_writer import clear_slots
from pruningawaretraining.registry import build

LAYERS = {
    "linear": lambda: nn.Linear(12, 8),
    "padded": lambda: nn.Linear(10, 11),
    "conv": lambda: nn.Conv2d(8, 20, 3),
}
CASES = [
    (layer, pattern)
    for layer in LAYERS
    for pattern in (
        "unstructured",
        "4x1",
        "1x4",
        "2x2",
        "channelx1",
        "1xchannel",
        "2:4",
        {"type": "slice", "types": ["Linear", "Conv"]},
    )
]
IRREGULAR = ("4x1", "1x4", "2x2")
"""Their last block of the padded layer is not full."""


@pytest.mark.parametrize(("layer", "pattern"), CASES)
def test_the_compiled_pass_is_pytorchs(layer: str, pattern: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[layer]())
    (member,) = build("pattern", pattern).build(model, ["0"], []).members
    values = torch.randn(member.parameter.shape)
    values.view(-1)[::7] = math.inf
    values.view(-1)[1::7] = math.nan
    chosen = torch.rand(member.n_slots) < 0.6
    fast, plain, expected = values.clone(), values.double(), values.clone()
    fold = fold_of(member)
    fill_groups(member, expected, chosen, 0.0)
    assert bool((expected == 0).any()) and (fold is None) == (layer == "padded" and pattern in IRREGULAR)
    for _ in range(2 if fold is not None else 0):  # what is 0 already stays so
        clear_slots(fold, fast, chosen)
        clear_slots(fold, plain, chosen)  # float64 is not compiled
        assert torch.equal(fast.nan_to_num(5.0), expected.nan_to_num(5.0))
        assert torch.equal(plain.float().nan_to_num(5.0), expected.nan_to_num(5.0))


def flat_of(parameter_shape: tuple[int, int], pattern: Any) -> tuple[int, int, int] | None:
    model = nn.Sequential(nn.Linear(parameter_shape[1], parameter_shape[0]))
    (member,) = build("pattern", pattern).build(model, ["0"], []).members
    fold = fold_of(member)
    return None if fold is None else fold.flat


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("4x1", (2, 4, 12)), ("1x4", (24, 4, 1)), ("unstructured", (8, 1, 12)), ("channelx1", (1, 8, 12)), ("2x2", None)],
)
def test_how_a_weight_is_seen(pattern: str, expected: tuple[int, int, int] | None) -> None:
    assert flat_of((8, 12), pattern) == expected


@pytest.mark.skipif(not fused.available(), reason="numba is not installed")
def test_the_compiled_pass_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    (member,) = build("pattern", "4x1").build(nn.Sequential(nn.Linear(4, 8)), ["0"], []).members
    weight = member.parameter.detach()

    def refuse(self: Tensor, *arguments: Any) -> Tensor:
        raise AssertionError("PyTorch's operation was used")

    monkeypatch.setattr(Tensor, "masked_fill_", refuse)
    fold = fold_of(member)
    assert fold is not None
    clear_slots(fold, weight, torch.tensor([True] * 4 + [False] * 4))
    assert int((weight == 0).sum()) == 16
