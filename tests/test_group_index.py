"""Norms, gradients and masks of channel groups: compiled passes and PyTorch's operations against their definition."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining.groups import kernels as fused
from pruningawaretraining.groups.channel_norms import GroupIndex
from pruningawaretraining.groups.grouping import Grouping, GroupSet, Member
from pruningawaretraining.masks.factor_writer import FactorWriter
from pruningawaretraining.masks.masks import Masks

SIZE = 5
# shape of the weight -> for each dimension that has groups, the group of each channel (5: outside)
CASES: dict[str, tuple[tuple[int, ...], dict[int, list[int]]]] = {
    "norm": ((5,), {0: [0, 1, 2, 3, 4]}),
    "linear, rows": ((5, 3), {0: [4, 3, 2, 1, 0]}),
    "linear, columns": ((2, 5), {1: [0, 1, 2, 3, 4]}),
    "linear, both": ((3, 6), {0: [0, 1, 2], 1: [0, 1, 2, 3, 4, 5]}),
    "flattened": ((7, 10), {1: [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]}),
    "conv": ((9, 5, 3, 2), {0: [0, 1, 2, 3, 4, 5, 5, 0, 1], 1: [4, 3, 2, 1, 0]}),
    "conv, one row": ((1, 5, 3, 3), {0: [5], 1: [0, 1, 2, 3, 4]}),
    "transposed conv": ((5, 4, 2, 2), {0: [0, 1, 2, 3, 4], 1: [1, 1, 2, 2]}),
    "depthwise": ((5, 1, 3, 3), {0: [0, 1, 2, 3, 4]}),
    "a later dimension": ((2, 3, 5), {2: [0, 1, 2, 3, 4]}),
}


@pytest.fixture(params=["compiled", "plain", "channels last", "double"])
def change(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "compiled":
        monkeypatch.setattr(fused, "kernels", lambda: None)
    elif not fused.available():
        pytest.skip("needs numba")
    return str(request.param)


def grouping_of(case: str, change: str) -> tuple[nn.Parameter, Grouping]:
    torch.manual_seed(0)
    shape, groups = CASES[case]
    values = torch.randn(shape, dtype=torch.float64 if change == "double" else torch.float32)
    if change == "channels last" and len(shape) == 4:
        values = values.to(memory_format=torch.channels_last)
    parameter = nn.Parameter(values)
    parameter.grad = torch.randn_like(values)
    members = [Member.along("weight", parameter, dim, torch.tensor(of), SIZE, "out") for dim, of in groups.items()]
    return parameter, Grouping("channel", tuple(members), (GroupSet("layer", 0, SIZE),))


def spread(values_G: Tensor, case: str, outside: float) -> list[Tensor]:
    """For each dimension that has groups, the values of each weight's group."""
    shape, groups = CASES[case]
    padded = torch.cat([values_G, torch.full((1,), outside)])
    views = ([-1 if index == dim else 1 for index in range(len(shape))] for dim in groups)
    return [padded[torch.tensor(of)].view(view).expand(shape) for of, view in zip(groups.values(), views, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_squared_norms_are_sums_over_each_group(case: str, change: str) -> None:
    parameter, grouping = grouping_of(case, change)
    found_G = GroupIndex(grouping, ("out",)).squared_norms()
    for group in range(SIZE):
        chosen = spread(torch.eye(SIZE)[group], case, 0.0)
        expected = sum(float((parameter.detach().square() * one).sum()) for one in chosen)
        assert float(found_G[group]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_gradients_take_each_groups_factor_times_the_weight(case: str, change: str) -> None:
    parameter, grouping = grouping_of(case, change)
    factor_G = torch.linspace(-1, 2, SIZE)
    expected = parameter.grad + parameter.detach() * sum(spread(factor_G, case, 0.0))
    index = GroupIndex(grouping, ("out",))
    index.add_to_gradients(factor_G, only=set())
    assert not torch.allclose(parameter.grad, expected)
    index.add_to_gradients(factor_G)
    assert torch.allclose(parameter.grad, expected.to(parameter.dtype), atol=1e-6)


@pytest.mark.skipif(not fused.available(), reason="needs numba")
@pytest.mark.parametrize(
    ("case", "rows", "columns"),
    [("conv", 9, 30), ("linear, columns", 0, 5), ("norm", 5, 0), ("a later dimension", 0, 0)],
)
def test_one_compiled_pass_takes_rows_and_columns_of_a_weight(
    case: str, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    real = fused.kernels()
    assert real is not None
    watched = {
        name: lambda *arrays: seen.append((len(arrays[-2]), len(arrays[-1])))
        for name in ("add_square_sums", "add_scaled")
    }
    monkeypatch.setattr(fused, "kernels", lambda: dataclasses.replace(real, **watched))
    index = GroupIndex(grouping_of(case, "compiled")[1], ("out",))
    index.squared_norms()
    index.add_to_gradients(torch.ones(SIZE))
    assert seen == ([(rows, columns)] * 2 if rows + columns else [])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("masked", [[], [1], [0, 3], [0, 1, 2, 3, 4]], ids=str)
def test_masks_clear_every_weight_of_a_masked_group_and_no_other(case: str, masked: list[int], change: str) -> None:
    parameter, grouping = grouping_of(case, change)
    keep_G = torch.ones(SIZE, dtype=torch.bool)
    keep_G[masked] = False
    before = parameter.detach().clone()
    masks = Masks(grouping, FactorWriter(grouping))
    masks.set(keep_G)
    expected = before * torch.stack(spread(keep_G.float(), case, 1.0)).prod(0)
    assert torch.equal(parameter.detach(), expected.to(before.dtype))
    with torch.no_grad():
        parameter += 1
    version = parameter._version
    masks.apply()
    assert torch.equal(parameter.detach() == 0, expected == 0)
    assert not masks.active or parameter._version > version, "autograd has to notice"
