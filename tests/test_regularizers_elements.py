"""The slice penalty and the block group lasso."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from pruningawaretraining import Pruning, registry
from pruningawaretraining.masks.element_penalties import BlockLasso, SlicePenalty
from pruningawaretraining.patterns.block import Block
from pruningawaretraining.patterns.slice import Slice


def conv(values: list[list[float]]) -> nn.Sequential:
    """Filters by kernel positions of one input channel."""
    weight = torch.tensor(values)
    model = nn.Sequential(nn.Conv2d(1, len(weight), (1, weight.shape[1]), bias=False))
    with torch.no_grad():
        model[0].weight.copy_(weight.view(len(weight), 1, 1, -1))
    return model


def test_the_penalty_counts_slices_and_its_gradient_is_that_of_the_log() -> None:
    model = conv([[3.0, 0.3, 0.0], [4.0, 0.4, 0.0]])
    penalty = SlicePenalty(0.1).penalty(Slice(block_size=2).build(model))
    assert penalty.item() == pytest.approx(0.1 * 2)  # the slice of zeros adds nothing
    penalty.backward()
    gradient = model[0].weight.grad.view(2, 3)
    expected = [[0.1 * 3 / 25, 0.1 * 0.3 / 0.25, 0.0], [0.1 * 4 / 25, 0.1 * 0.4 / 0.25, 0.0]]
    assert torch.allclose(gradient, torch.tensor(expected))


@pytest.mark.parametrize("kernel", [1, (3, 3), (1, 5), (7, 2)])
@pytest.mark.parametrize("order", ["interleaved", "contiguous"])
def test_the_penalty_works_for_any_kernel_and_remainder(kernel: int | tuple[int, int], order: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 10, kernel, bias=False))
    grouping = Slice(block_size=4, order=order).build(model)
    SlicePenalty(1.0).penalty(grouping).backward()
    got = model[0].weight.grad.clone()
    model.zero_grad()
    squares = torch.zeros(grouping.size).index_add_(
        0, _numbers(grouping)[_numbers(grouping) >= 0], model[0].weight.flatten().square()[_numbers(grouping) >= 0]
    )
    squares.sqrt().log().sum().backward()
    assert torch.allclose(got, model[0].weight.grad, atol=1e-5)
    assert not got[8:].any()


def _numbers(grouping: object) -> torch.Tensor:
    ((member, numbers),) = grouping.expand(torch.arange(grouping.size), outside=-1)  # type: ignore[attr-defined]
    return numbers.expand(member.parameter.shape).flatten()


def test_the_penalty_is_finite_where_weights_vanish() -> None:
    for size in (0.0, 1e-30, 1e-20, 1e-9):
        model = conv([[size], [size]])
        penalty = SlicePenalty(1.0).penalty(Slice(block_size=2).build(model))
        penalty.backward()
        assert math.isfinite(penalty.item())
        assert bool(torch.isfinite(model[0].weight.grad).all())


def test_the_penalty_pulls_small_slices_to_zero_and_leaves_large_ones() -> None:
    model = conv([[1.0, 0.01], [1.0, 0.01]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    grouping = Slice(block_size=2).build(model)
    for _ in range(20):
        optimizer.zero_grad()
        SlicePenalty(1e-3).penalty(grouping).backward()
        optimizer.step()
    large, small = model[0].weight.detach().view(2, 2).square().sum(0).sqrt()
    assert large == pytest.approx(math.sqrt(2), rel=1e-3)
    assert small < 0.8 * 0.01 * math.sqrt(2)


def test_block_lasso_divides_by_the_norm_of_the_weights() -> None:
    model = conv([[3.0, 0.3, 0.0, 1.0], [4.0, 0.4, 0.0, 0.0]])
    BlockLasso(0.5).after_step(Block(2, 1).build(model), lambda parameter: 0.2)  # a step of 0.1
    expected = [[3 * (1 - 0.1 / 5), 0.3 * (1 - 0.1 / 0.5), 0.0, 0.9], [4 * (1 - 0.1 / 5), 0.4 * (1 - 0.1 / 0.5), 0, 0]]
    assert torch.allclose(model[0].weight.detach().view(2, 4), torch.tensor(expected))


def test_block_lasso_ends_at_zero_without_a_nan() -> None:
    model = conv([[3e-3, 0.0], [4e-3, 0.0], [1.0, 0.0]])
    BlockLasso(1.0).after_step(Block(2, 1).build(model), lambda parameter: 0.01)  # the last block is padded
    assert model[0].weight.detach().view(3, 2).tolist() == [[0, 0], [0, 0], [pytest.approx(0.99), 0]]


@pytest.mark.parametrize("options", [SlicePenalty, BlockLasso])
def test_a_negative_strength_is_refused(options: type[SlicePenalty] | type[BlockLasso]) -> None:
    with pytest.raises(ValueError, match="strength: -1 must be from 0 to 1e\\+06"):
        options(-1)


def test_a_regulariser_is_built_once_in_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    @dataclass(frozen=True)
    class Own(SlicePenalty):
        def __post_init__(self) -> None:
            built.append(self.strength)

    registry.names("regularizer")
    monkeypatch.setitem(registry._ENTRIES["regularizer"], "own", Own)
    model = conv([[3.0, 0.3, 0.0], [4.0, 0.4, 0.0]])
    rule = {"pattern": "2x1", "regularizer": {"type": "own", "strength": 0.1}, "target": {"sparsity": 0.5}, "start": 5}
    pruner = Pruning(model, {"rules": [rule]})
    built.clear()
    losses = [pruner.slice_regularize(model).item() for _ in range(3)]
    assert losses == pytest.approx([0.2] * 3) and built == [0.1]
