"""Which elements stay: literal scores and masks, ties, caps, N:M, progressive steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pruningawaretraining.allocation.ranking import SLACK
from pruningawaretraining.allocation.threshold import (
    Limits,
    allocate,
    classes_of,
    progressive,
    zero_groups,
)
from pruningawaretraining.allocation.windows import allocate_windows, count_pruned
from pruningawaretraining.errors import TargetError
from pruningawaretraining.patterns.block import Block, NofM
from pruningawaretraining.patterns.elements import input_dims
from pruningawaretraining.registry import names

INF = float("inf")


def kept(scores: list[float], sizes: list[int], sparsity: float, *limits: float, **options: Any) -> list[int]:
    for key in ("removed_G", "exempt_G"):
        if key in options:
            options[key] = torch.tensor(options[key]).bool()
    if "classes_S" in options:
        options["classes_S"] = torch.tensor(options["classes_S"])
    return allocate(torch.tensor(scores), sizes, sparsity, Limits(*limits), **options).int().tolist()


TABLE = [
    # scores, sizes of sets, sparsity, limits (least, most), options, who stays
    ([3, 1, 2, 4], [4], 0.5, (), {}, [1, 0, 0, 1]),
    ([3, 1, 2, 4], [4], 0.0, (), {}, [1, 1, 1, 1]),  # nothing is nothing
    ([3, 1, 2, 4], [4], 1.0, (), {}, [0, 0, 0, 0]),
    ([3, 1, 2, 4], [4], 0.7, (), {}, [1, 0, 0, 1]),  # rounded down: never above the target
    ([1, 1, 1, 1], [4], 0.5, (), {}, [0, 0, 1, 1]),  # ties: the first go, and no more
    ([1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [10], 0.3, (), {}, [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]),
    ([5, 1, 1, 1, 0, 9], [6], 0.5, (), {}, [1, 0, 0, 1, 0, 1]),
    ([1, 2, 3, 4, 5, 6], [3, 3], 1 / 3, (), {"classes_S": [0, 1]}, [0, 1, 1, 0, 1, 1]),
    ([1, 2, 3, 4, 5, 6], [3, 3], 0.5, (), {"classes_S": [0, 0]}, [0, 0, 0, 1, 1, 1]),
    ([1, 2, 3, 4, 5, 6], [3, 3], 0.5, (0, 0.67), {}, [0, 0, 1, 0, 1, 1]),  # what one may not lose another does
    ([1, 2, 3, 4, 5, 6], [3, 3], 0.5, (1 / 3, 1), {}, [0, 0, 1, 0, 1, 1]),
    ([1, 2, 3, 4, 5, 6], [3, 3], 0.9, (0, 0.5), {}, [0, 1, 1, 0, 1, 1]),  # out of reach: as far as the caps allow
    ([1, 2, 3, 4, 5, 6], [3, 3], 0.0, (0.4, 1), {}, [0, 1, 1, 0, 1, 1]),  # the least of each
    ([1, 1, 1, 1, 1, 1], [3, 3], 0.5, (0, 0.67), {}, [0, 0, 1, 0, 1, 1]),
    ([9, 1, 2, 3], [4], 0.5, (), {"removed_G": [1, 0, 0, 0]}, [0, 0, 1, 1]),  # stays gone, and counts
    ([9, 1, 2, 3], [4], 0.0, (), {"removed_G": [1, 0, 0, 0]}, [0, 1, 1, 1]),
    ([0, 0, 2, 1, 3, 4], [6], 0.5, (), {"exempt_G": [1, 1, 0, 0, 0, 0]}, [1, 1, 0, 0, 1, 1]),  # out of the count
    ([0, 0, 2, 1, 3, 4], [6], 1.0, (), {"exempt_G": [1, 1, 0, 0, 0, 0]}, [1, 1, 0, 0, 0, 0]),
    ([INF, INF, 1], [3], 2 / 3, (), {}, [0, 1, 0]),
    ([INF, INF, 1], [3], 1.0, (), {"exempt_G": [1, 0, 0]}, [1, 0, 0]),
    ([-3, -1, -2], [3], 1 / 3, (), {}, [0, 1, 1]),
    ([-0.0, 0.0, -0.0, 1], [4], 0.5, (), {}, [0, 0, 1, 1]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("scores", "sizes", "sparsity", "limits", "options", "expected"), TABLE)
def test_who_stays(
    scores: Any, sizes: Any, sparsity: float, limits: Any, options: Any, expected: Any, dtype: torch.dtype
) -> None:
    flags = {key: torch.tensor(value).bool() for key, value in options.items() if key.endswith("_G")}
    classes = {key: torch.tensor(value) for key, value in options.items() if key.endswith("_S")}
    given = torch.tensor(scores, dtype=dtype)
    before = given.clone()
    keep = allocate(given, sizes, sparsity, Limits(*limits), **flags, **classes)
    assert keep.int().tolist() == expected
    assert torch.equal(given, before)


def test_scores_that_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        kept([1.0, float("nan")], [2], 0.5)
    with pytest.raises(ValueError, match="need 3 numbers"):
        kept([1.0, 2.0], [3], 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_are_exact_for_every_sparsity_and_water_filling_is_optimal(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [50, 7, 123, 20]
    scores = torch.randint(-3, 9, (200,), generator=generator).to(dtype)  # many ties
    for percent in range(0, 101, 3):
        for limits in (Limits(), Limits(0.1, 0.8), Limits(0.3, 0.5)):
            keep = allocate(scores, sizes, percent / 100, limits)
            least = [int(limits.min_sparsity * size + SLACK) for size in sizes]
            most = [size - -int(-((1 - limits.max_sparsity) * size - SLACK) // 1) for size in sizes]
            gone = [int((~part).sum()) for part in torch.split(keep, sizes)]
            assert sum(gone) == min(max(percent * 2, sum(least)), sum(most))
            assert all(low <= count <= high for low, count, high in zip(least, gone, most, strict=True))
            _check_exchange(scores, keep, sizes, gone, least, most)


def _check_exchange(scores: Any, keep: Any, sizes: Any, gone: Any, least: Any, most: Any) -> None:
    """No pair of a removed and a kept group may be exchanged for less importance removed."""
    parts = list(zip(torch.split(scores.float(), sizes), torch.split(keep, sizes), strict=True))
    for i, (values_i, keep_i) in enumerate(parts):
        for j, (values_j, keep_j) in enumerate(parts):
            if bool(keep_i.all()) or not bool(keep_j.any()):
                continue
            if i == j or (gone[i] > least[i] and gone[j] < most[j]):
                assert values_i[~keep_i].max() <= values_j[keep_j].min()


@pytest.mark.parametrize("scope", names("scope"))
def test_ranking_classes_of_layers(scope: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 8))
    expected = {"global": [0, 0, 0], "local": [0, 1, 2], "isomorphic": [0, 0, 1]}
    assert classes_of(Block().build(model), scope).tolist() == expected[scope]


def windows_kept(
    rows: list[list[float]], window: tuple[int, int], sparsity: float, removed: list[list[int]] | None = None
) -> list[list[int]]:
    model = nn.Sequential(nn.Linear(len(rows[0]), len(rows)))
    grouping = NofM(*window).build(model)
    removed_G = None if removed is None else torch.tensor(removed).bool().flatten()
    keep = allocate_windows(
        torch.tensor(rows).flatten(), grouping, window, sparsity, input_dims(model, grouping), removed_G=removed_G
    )
    result: list[list[int]] = keep.int().view(len(rows), -1).tolist()
    return result


WINDOWS = [
    ([[4, 1, 2, 3]], (2, 4), 0.5, None, [[1, 0, 0, 1]]),
    ([[1, 1, 1, 1]], (2, 4), 0.5, None, [[0, 0, 1, 1]]),
    ([[4, 1, 2, 3]], (1, 4), 0.25, None, [[1, 0, 1, 1]]),
    ([[4, 1, 2, 3]], (3, 4), 0.75, None, [[1, 0, 0, 0]]),
    ([[4, 1, 2, 3], [1, 9, 9, 0]], (2, 4), 0.25, None, [[1, 1, 1, 1], [0, 1, 1, 0]]),  # the cheaper window first
    ([[4, 1, 2, 3], [1, 9, 9, 0]], (2, 4), 0.1, None, [[1, 1, 1, 1], [1, 1, 1, 1]]),
    ([[1, 2, 3, 4, 5, 6]], (2, 4), 0.5, None, [[0, 0, 1, 1, 1, 1]]),  # two are left over: padding already gives two
    ([[1, 2, 3, 4, 9, 8, 7]], (2, 4), 0.5, None, [[0, 0, 1, 1, 1, 1, 0]]),
    ([[4, 1, 2, 3], [1, 9, 9, 0]], (2, 4), 0.25, [[1, 0, 0, 0], [0, 0, 0, 0]], [[0, 0, 1, 1], [1, 1, 1, 1]]),
    ([[4, 1, 2, 3]], (2, 4), 0.5, [[1, 1, 1, 0]], [[0, 0, 0, 1]]),  # zeros beyond N stay, and no more go
]


@pytest.mark.parametrize(("rows", "window", "sparsity", "removed", "expected"), WINDOWS)
def test_n_of_m(rows: Any, window: tuple[int, int], sparsity: float, removed: Any, expected: Any) -> None:
    rows = [[float(value) for value in row] for row in rows]
    assert windows_kept(rows, window, sparsity, removed) == expected


def test_n_of_m_of_a_convolution_runs_along_the_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(4, 2, 2))
    grouping = NofM(2, 4).build(model)
    scores = torch.rand(grouping.size, generator=torch.Generator().manual_seed(0))
    keep = allocate_windows(scores, grouping, (2, 4), 0.5, input_dims(model, grouping)).view(2, 4, 2, 2)
    assert bool((keep.sum(1) == 2).all())
    assert torch.equal(keep, scores.view(2, 4, 2, 2).argsort(1).argsort(1) >= 2)


def test_n_of_m_refuses_more_than_it_has() -> None:
    with pytest.raises(TargetError, match="0.6 is out of reach of 2:4. Allowed: at most 0.5"):
        windows_kept([[1.0, 2.0, 3.0, 4.0]], (2, 4), 0.6)


@pytest.mark.parametrize(
    ("part", "expected"), [(1, [1, 1, 1, 0, 1, 0]), (2, [0, 1, 1, 0, 1, 0]), (3, [0, 1, 0, 0, 1, 0])]
)
def test_progressive_steps_take_the_least_important_first(part: int, expected: list[int]) -> None:
    scores = torch.tensor([2.0, 9.0, 3.0, 0.0, 8.0, 1.0])
    before = torch.tensor([1, 1, 1, 0, 1, 1]).bool()
    after = torch.tensor([0, 1, 0, 0, 1, 0]).bool()
    assert progressive(before, after, scores, part, 3).int().tolist() == expected


def test_zeros_of_a_pruned_checkpoint() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, -2.0]]))
    assert zero_groups(Block(2, 1).build(model)).tolist() == [True, False, False]


def test_windows_are_counted_as_pruned_with_at_least_n_zeros() -> None:
    grouping = NofM(2, 4).build(nn.Sequential(nn.Linear(6, 2, bias=False)))
    rows = [[1, 0, 0, 0, 1, 1], [1, 1, 1, 0, 1, 0]]  # the last two of a row are a window that is filled up with zeros
    keep_G = torch.tensor(rows).bool().flatten()
    assert count_pruned(keep_G, grouping, (2, 4), [1]) == 3
    assert count_pruned(torch.ones(12, dtype=torch.bool), grouping, (2, 4), [1]) == 2
