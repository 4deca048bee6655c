"""The lowest of many scores: by partition on the host and by bisection without it, against sorting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining.allocation.threshold import (
    Limits,
    allocate,
    progressive,
)
from pruningawaretraining.allocation.windows import _lowest_in_rows, allocate_windows
from pruningawaretraining.groups import kernels as fused
from pruningawaretraining.groups import lowest
from pruningawaretraining.patterns.block import NofM
from pruningawaretraining.patterns.elements import input_dims

INF = float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
rand = torch.Generator()


def number(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=rand))


def scores_of(trial: int, size: int) -> Tensor:
    """Scores with very many ties, with few, of both signs, with zeros of both signs and infinities."""
    scores = torch.randn(size, generator=rand) * (0.5, 3, 1e-42, 1e30)[trial % 4]
    scores = scores.round() if trial % 3 else scores.square()
    for share, value in ((0.2, -INF), (0.2, INF), (0.1, 0.0), (0.1, -0.0)):
        if number(0, 2) == 0:
            scores[torch.rand(size, generator=rand) < share] = value
    return scores.to(DTYPES[number(0, 3)])


def sizes_of(trial: int) -> list[int]:
    """Sets that fill rows, that do not, that are empty."""
    count = number(1, 6)
    return [number(0, 2) * lowest.ROW if trial % 3 == 0 else number(0, 40) * number(0, 70) for _ in range(count)]


def by_sorting(scores: Tensor, sizes: list[int], classes: list[int], wanted: dict[int, int]) -> Tensor:
    keep = torch.ones(len(scores), dtype=torch.bool)
    numbers = torch.repeat_interleave(torch.tensor(classes), torch.tensor(sizes))
    for one, count in wanted.items():
        mine = torch.nonzero(numbers == one).flatten()
        keep[mine[torch.argsort(scores[mine], stable=True)[:count]]] = False
    return keep


@pytest.mark.parametrize("kind", [lowest.HostRanking, lowest.DeviceRanking])
def test_each_class_loses_its_lowest_and_the_first_of_equals(kind: Any) -> None:
    rand.manual_seed(0)
    for trial in range(60):
        sizes = sizes_of(trial)
        classes = [number(0, 2) for _ in sizes]
        scores = scores_of(trial, sum(sizes))
        totals = {one: sum(s for s, c in zip(sizes, classes, strict=True) if c == one) for one in sorted(set(classes))}
        wanted = {one: (number(0, total), total, 0)[trial % 3 and number(0, 2)] for one, total in totals.items()}
        keep = kind(scores.clone(), sizes, classes).without_lowest(wanted)
        assert torch.equal(keep, by_sorting(scores, sizes, classes, wanted)), trial


def outcome(*args: Any, **options: Any) -> Tensor | str:
    try:
        return allocate(*args, **options)
    except ValueError as error:
        return str(error)


def test_allocation_decides_the_same_without_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    rand.manual_seed(1)
    for trial in range(80):
        sizes = sizes_of(trial)
        scores = scores_of(trial, sum(sizes))
        options: dict[str, Any] = {"classes_S": torch.tensor([number(0, 2) for _ in sizes])}
        for key, share in (("removed_G", 0.3), ("exempt_G", 0.2)):
            if number(0, 1):
                options[key] = torch.rand(sum(sizes), generator=rand) < share
        if trial % 20 == 19 and len(scores):
            scores[-1] = float("nan")
        limits = (Limits(), Limits(0.2, 0.6), Limits(0, 0.5))[number(0, 2)]
        given = (scores, sizes, number(0, 10) / 10, limits)
        with monkeypatch.context() as patched:
            patched.setattr(lowest, "on_host", lambda values: False)
            found = outcome(*given, **options)
        expected = outcome(*given, **options)
        assert found == expected if isinstance(expected, str) else torch.equal(found, expected), trial  # type: ignore


def test_masks_in_parts_are_the_same_without_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    rand.manual_seed(2)
    for trial in range(30):
        size = number(1, 3000)
        scores = scores_of(trial, size)
        before = torch.rand(size, generator=rand) < 0.8
        after = before & (torch.rand(size, generator=rand) < 0.5)
        part = number(1, 4)
        expected = progressive(before, after, scores, part, 4)
        with monkeypatch.context() as patched:
            patched.setattr(lowest, "on_host", lambda values: False)
            assert torch.equal(progressive(before, after, scores, part, 4), expected)


@pytest.mark.parametrize("of", [2, 4, 7, 16, 32])
def test_the_lowest_of_windows_are_the_same_without_the_host(of: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rand.manual_seed(of)
    for trial in range(6):
        values = scores_of(trial, 30 * of).view(5, 6, of)
        count = number(1, of - 1)
        found = lowest.lowest_in_rows(values, count)
        order = values.argsort(dim=-1, stable=True).argsort(dim=-1)
        assert torch.equal(found, order < count)
        with monkeypatch.context() as patched:
            patched.setattr(fused, "kernels", lambda: None)
            assert torch.equal(found, _lowest_in_rows(values, count))


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5])
def test_n_of_m_is_the_same_without_the_host(sparsity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rand.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(6, 5, 3), nn.Linear(8, 8), nn.ConvTranspose2d(9, 4, 2), nn.Linear(11, 3))
    grouping = NofM(2, 4).build(model)
    for trial in range(10):
        scores = scores_of(trial, grouping.size)
        removed = torch.rand(grouping.size, generator=rand) < 0.1 if trial % 2 else None
        dims, limits = input_dims(model, grouping), Limits(0.1, 0.9)
        given = (scores, grouping, (2, 4), sparsity, dims, limits, None, removed)
        expected = allocate_windows(*given)
        with monkeypatch.context() as patched:
            patched.setattr(lowest, "on_host", lambda values: False)
            assert torch.equal(allocate_windows(*given), expected), trial


def test_flags_are_counted_by_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [0, 3000, lowest.ROW, 1]
    flags = torch.rand(sum(sizes) + 3, generator=rand.manual_seed(4)) < 0.7
    flags[3000 : 3000 + lowest.ROW] = True  # a full row is the most that is counted at a time
    for shifted in (flags[3:], flags[:-3]):  # a part need not begin at a whole word
        expected = [int(part.sum()) for part in torch.split(shifted, sizes)]
        assert lowest.counts_of(shifted, sizes) == expected
        with monkeypatch.context() as patched:
            patched.setattr(lowest, "on_host", lambda values: False)
            assert lowest.counts_of(shifted, sizes) == expected
            assert lowest.counts_of(shifted[: lowest.ROW], [lowest.ROW]) == [int(shifted[: lowest.ROW].sum())]
