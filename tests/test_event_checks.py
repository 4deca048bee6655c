"""What an event looks at in all weights: whether they are finite, and whether masked ones are still 0."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining import Pruning
from pruningawaretraining.engine.rule import check_finite
from pruningawaretraining.errors import ModelError
from pruningawaretraining.groups.lowest import drop_lowest
from pruningawaretraining.groups.reductions import count_nan
from pruningawaretraining.masks.restoring import restored
from pruningawaretraining.patterns.block import Unstructured

INF, NAN = float("inf"), float("nan")


def model_with(values: list[float], dtype: torch.dtype) -> nn.Sequential:
    """Two layers; the second one's weight holds these values."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(2, 2, bias=False)).to(dtype)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(values, dtype=torch.float64).view(2, 2))
    return model


@pytest.mark.parametrize(
    ("values", "dtype", "finite"),
    [
        ([1, -2, 3, 0], torch.float32, True),
        ([3e38, 3e38, 3e38, 3e38], torch.float32, True),  # the sum is infinite
        ([3e38, 3e38, -3e38, -3e38], torch.float32, True),
        ([6e4, 6e4, 6e4, 6e4], torch.float16, True),
        ([3e38, 3e38, 3e38, 0], torch.bfloat16, True),
        ([1e300, -1e300, 1e300, 0], torch.float64, True),
        ([1, NAN, 0, 0], torch.float32, False),
        ([1, INF, 0, 0], torch.float16, False),
        ([-INF, INF, 0, 0], torch.float32, False),
        ([1e300, 1, 2, -INF], torch.float64, False),
        ([3e38, 3e38, 3e38, NAN], torch.bfloat16, False),
    ],
)
def test_weights_are_finite_or_named_whatever_they_add_up_to(
    values: list[float], dtype: torch.dtype, finite: bool
) -> None:
    grouping = Unstructured().build(model_with(values, dtype))
    if finite:
        check_finite("rules[0]", grouping)
        return
    with pytest.raises(ModelError, match=r"rules\[0\]: 1\.weight is not finite"):
        check_finite("rules[0]", grouping)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masked_weights_that_are_not_zero_are_cleared_and_counted(dtype: torch.dtype) -> None:
    first = nn.Parameter(torch.tensor([[1.0, 0.0, -0.0], [NAN, INF, 2.0]]))
    second, third = nn.Parameter(torch.tensor([0.0, 5.0])), nn.Parameter(torch.tensor([[4.0, 0.0], [5.0, 6.0]]))
    masks = [
        (first, torch.tensor([[1, 0, 0], [0, 0, 1]])),
        (second, torch.tensor([0, 1])),
        (third, torch.tensor([[1, 0]])),  # of columns
        (third, torch.tensor([[1], [0]])),  # of rows
    ]

    def factors() -> Iterator[tuple[Tensor, Tensor]]:
        return ((parameter, keep.to(dtype)) for parameter, keep in masks)

    assert restored(factors) == {id(first): 2, id(third): 3}  # the 6 is in a masked row and in a masked column
    assert first.tolist() == [[1, 0, 0], [0, 0, 2]]
    assert second.tolist() == [0, 5] and third.tolist() == [[4, 0], [0, 0]]
    assert restored(factors) == {}
    assert restored(lambda: []) == {}


@pytest.mark.parametrize("pattern", ["slice", "4x1", "1x4", "2x3", "2:4", "unstructured"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # with a compiled pass where it fits, and without
def test_what_is_not_zero_any_more_is_counted_exactly(pattern: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 19, 3), nn.Conv2d(19, 18, 3, padding=1)).to(dtype)
    pruner = Pruning(model, {"rules": [{"pattern": pattern, "target": {"sparsity": 0.5}}]})
    pruner.prune()
    (masks,) = pruner.engine.masks
    assert masks.restore() == {}
    expected = {}
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            before = weight.detach().clone()
            with torch.no_grad():
                weight.masked_fill_(torch.rand_like(weight) < 0.3, NAN if name == "0.weight" else 7.0)
            expected[name] = int(((before == 0) & (weight != 0)).sum())
    assert masks.restore() == expected and all(expected.values())
    assert masks.restore() == {} and bool((masks.grouping.members[0].parameter == 0).any())


@pytest.mark.parametrize(
    "values",
    [[1.0, 2.0, 3.0], [INF, -INF, 1.0], [INF, INF, 0.0], [3e38, 3e38, -3e38], [NAN, 1.0, NAN], [NAN, INF, -INF]],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nan_is_counted_beside_anything(values: list[float], dtype: torch.dtype) -> None:
    assert count_nan(torch.tensor(values, dtype=dtype)) == sum(map(math.isnan, values))


@pytest.mark.parametrize("count", [0, 1, 3, 4, 6, 7])
def test_the_lowest_of_several_runs_go_and_the_first_among_equals(count: int) -> None:
    values = [torch.tensor([3.0, 1.0, 2.0, 1.0]), torch.tensor([1.0, 0.5, 3.0])]
    keeps = [torch.ones(4, dtype=torch.bool), torch.ones(3, dtype=torch.bool)]
    drop_lowest(values, keeps, count)
    gone = (~torch.cat(keeps)).nonzero().flatten().tolist()
    order = [5, 1, 3, 4, 2, 0, 6]  # by value, then by place
    assert gone == sorted(order[:count])
