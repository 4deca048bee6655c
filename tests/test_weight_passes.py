"""Passes over many weights with few launches, on the CPU, against their definition; the groups are those of
test_group_index."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_group_index import CASES, SIZE, spread
from torch import Tensor, nn

from pruningawaretraining.groups import weight_stores
from pruningawaretraining.groups.weight_passes import WeightPasses
from pruningawaretraining.groups.weight_stores import Sided
from pruningawaretraining.masks.factor_writer import MaskFactors

KINDS = {
    "float": (torch.float32, False, 1e-5),
    "channels last": (torch.float32, True, 1e-5),
    "double": (torch.float64, False, 1e-5),
    "bfloat16": (torch.bfloat16, False, 2e-2),
    "bfloat16 channels last": (torch.bfloat16, True, 2e-2),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["at once", "one by one"])
def scratch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "one by one":
        monkeypatch.setattr(weight_stores, "SCRATCH", 1)
    yield


def weights_of(kind: str) -> list[tuple[str, nn.Parameter, Sided]]:
    """One weight of every case, with a gradient."""
    torch.manual_seed(0)
    dtype, last, _ = KINDS[kind]
    found = []
    for case, (shape, groups) in CASES.items():
        values = torch.randn(shape, dtype=dtype)
        values = values.to(memory_format=torch.channels_last) if last and len(shape) == 4 else values
        parameter = nn.Parameter(values)
        parameter.grad = torch.randn_like(values)
        sides = tuple((dim, torch.tensor(of)) for dim, of in groups.items())
        found.append((case, parameter, Sided(parameter, sides)))
    return found


def norms(found: list[tuple[str, nn.Parameter, Sided]]) -> Tensor:
    """Sums of squares by their definition."""
    return torch.stack(
        [
            sum(
                (parameter.detach().double().square() * one.double()).sum()
                for case, parameter, _ in found
                for one in spread(torch.eye(SIZE)[group], case, 0.0)
            )
            for group in range(SIZE)
        ]
    )


def test_squared_norms_are_sums_over_all_weights(kind: str) -> None:
    found = weights_of(kind)
    whole_G1, part_G1 = WeightPasses([one for _, _, one in found], SIZE).squared_norms()
    assert part_G1 is None
    assert whole_G1.dtype is torch.float32
    assert torch.allclose(whole_G1[:-1].double(), norms(found), rtol=1e-5)


@pytest.mark.parametrize("other_layout", [False, True])
def test_gradients_take_each_groups_factor_times_the_weight(kind: str, scratch: None, other_layout: bool) -> None:
    found, (_, last, tolerance) = weights_of(kind), KINDS[kind]
    factor_G = torch.linspace(-1, 2, SIZE)
    wanted = []
    for case, parameter, _ in found:
        if other_layout and parameter.dim() == 4:  # a gradient that is stored otherwise than its weight
            layout = torch.contiguous_format if last else torch.channels_last
            parameter.grad = parameter.grad.contiguous(memory_format=layout)
        total = sum(one.double() for one in spread(factor_G, case, 0.0))
        wanted.append(parameter.grad.double() + parameter.detach().double() * total)
    before = [parameter.grad.clone() for _, parameter, _ in found]
    passes, padded = WeightPasses([one for _, _, one in found], SIZE), torch.cat([factor_G, torch.zeros(1)])
    found[0][1].grad, kept = None, found[0][1].grad
    passes.add_scaled(padded, only=set())
    assert all(torch.equal(one.grad, old) for (_, one, _), old in zip(found[1:], before[1:], strict=True))
    passes.add_scaled(padded, only=None)
    assert found[0][1].grad is None
    passes = WeightPasses([found[0][2]], SIZE)
    found[0][1].grad = kept
    passes.add_scaled(padded, only={id(found[0][1])})
    for (case, parameter, _), expected in zip(found, wanted, strict=True):
        assert parameter.grad.dtype is parameter.dtype
        assert torch.allclose(parameter.grad.double(), expected, rtol=tolerance, atol=tolerance), case


def test_weights_of_several_dtypes_are_handled_together(scratch: None) -> None:
    found = weights_of("float") + weights_of("bfloat16") + weights_of("double")
    passes = WeightPasses([one for _, _, one in found], SIZE)
    assert torch.allclose(passes.squared_norms()[0][:-1].double(), norms(found), rtol=1e-5)
    before = [parameter.grad.clone() for _, parameter, _ in found]
    passes.add_scaled(torch.cat([torch.ones(SIZE), torch.zeros(1)]), None)
    changed = [not torch.equal(one.grad, old) for (_, one, _), old in zip(found, before, strict=True)]
    assert all(changed)


def test_what_is_moved_no_longer_fits() -> None:
    found = weights_of("float")
    conv = next(parameter for case, parameter, _ in found if case == "conv")
    holder = nn.Module()
    holder.weight = conv
    passes = WeightPasses([one for _, _, one in found], SIZE)
    assert passes.fits
    holder.to(memory_format=torch.channels_last)
    assert not passes.fits
    passes = WeightPasses([one for _, _, one in found], SIZE)
    assert torch.allclose(passes.squared_norms()[0][:-1].double(), norms(found), rtol=1e-5)
    holder.to(torch.bfloat16)
    assert not passes.fits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_follow_parameters_to_another_dtype_and_layout(dtype: torch.dtype) -> None:
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.ones(4, 3, 2, 2))
    rows, columns = torch.tensor([0.0, 1, 1, 1]).view(4, 1, 1, 1), torch.tensor([1.0, 0, 1]).view(1, 3, 1, 1)
    factors = MaskFactors([holder.weight] * 2, [rows, columns])
    expected = (rows * columns).expand(4, 3, 2, 2)
    for change in ({}, {"dtype": dtype}, {"memory_format": torch.channels_last}, {"dtype": torch.float64}):
        if change:
            holder.to(**change)
        with torch.no_grad():
            holder.weight.fill_(1)
            holder.weight.grad = torch.ones_like(holder.weight)
            factors.accumulated(holder.weight)
            factors.multiply()
            assert holder.weight.dtype is holder.weight.grad.dtype
            assert torch.equal(holder.weight.double(), expected.double())
            assert torch.equal(holder.weight.grad.double(), expected.double())
            holder.weight.grad.fill_(1)
            factors.multiply_gradients()
            assert torch.equal(holder.weight.grad.double(), expected.double())
