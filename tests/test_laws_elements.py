"""Every pattern with every criterion, scope and schedule: reduce and expand are adjoint, and counts are exact."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from pruningawaretraining.allocation.ranking import SLACK
from pruningawaretraining.allocation.threshold import Limits, allocate, classes_of
from pruningawaretraining.allocation.windows import allocate_windows
from pruningawaretraining.criteria.base import Statistics, collector_of
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.patterns.block import NofM
from pruningawaretraining.patterns.elements import input_dims
from pruningawaretraining.registry import build, names
from pruningawaretraining.schedules import sparsity_at

PATTERNS: list[Any] = [
    "4x1", "1x4", "3x2", "channelx1", "1xchannel", "2:4", "1:3", "1x1",
    {"type": "slice", "block_size": 4}, {"type": "slice", "block_size": 4, "order": "contiguous", "first_tap": True},
]  # fmt: skip
NEED_MACS = {"mac_aware"}
NEED_GRADIENTS = ("obs", "cap", "fast_cap", "sparse_gpt")


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, padding=1),
        nn.ConvTranspose2d(8, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10),
    )  # fmt: skip


@cache
def built(number: int) -> tuple[nn.Sequential, Any, Grouping]:
    model = small_model()
    pattern = build("pattern", PATTERNS[number])
    return model, pattern, pattern.build(model)


def element_criteria() -> list[str]:
    left_out = {*NEED_MACS, *NEED_GRADIENTS, "block_change", "reap", "reconstruction"}
    return [name for name in names("criterion") if name not in left_out and hasattr(build("criterion", name), "score")]


@cache
def scores_of(number: int, name: str) -> torch.Tensor:
    model, _, grouping = built(number)
    criterion = build("criterion", name)
    collector = collector_of(criterion)
    statistics = Statistics()
    if collector is not None:
        collector.attach(model, grouping)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            model.zero_grad()
            model(torch.randn(2, 3, 6, 6, generator=generator)).square().sum().backward()
            collector.on_before_step(grouping)
        statistics.tensors = collector.tensors()
        collector.detach()
    scores: torch.Tensor = criterion.score(grouping, statistics)
    return scores


numbers = pytest.mark.parametrize("number", range(len(PATTERNS)), ids=[str(pattern) for pattern in PATTERNS])


@numbers
def test_reduce_and_expand_are_adjoint(number: int) -> None:
    _, _, grouping = built(number)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(member.parameter.shape, generator=generator, dtype=torch.float64)
              for member in grouping.members]  # fmt: skip
    weights_G = torch.randn(grouping.size, generator=generator, dtype=torch.float64)
    spread = grouping.expand(weights_G)
    inner = sum(float((value * tensor).sum()) for value, (_, tensor) in zip(values, spread, strict=True))
    assert float(grouping.reduce(values) @ weights_G) == pytest.approx(inner, rel=1e-9)


@numbers
@pytest.mark.parametrize("name", element_criteria())
def test_scores_are_numbers(number: int, name: str) -> None:
    _, _, grouping = built(number)
    scores = scores_of(number, name)
    assert scores.shape == (grouping.size,)
    assert not torch.isnan(scores).any()


@numbers
@pytest.mark.parametrize("name", element_criteria())
@pytest.mark.parametrize("scope", names("scope"))
def test_counts_are_exact_in_every_schedule(number: int, name: str, scope: str) -> None:
    model, pattern, grouping = built(number)
    scores = scores_of(number, name)
    most = pattern.drop / pattern.of if isinstance(pattern, NofM) else 1.0
    for schedule in names("schedule"):
        keep = torch.ones(grouping.size, dtype=torch.bool)
        for event in (1, 2, 3):
            sparsity = sparsity_at(schedule, event / 3, 0.0, 0.8 * most)
            after = _next(model, pattern, grouping, scores, sparsity, scope, ~keep)
            assert not (after & ~keep).any(), "nothing that was gone comes back"
            keep = after
            if isinstance(pattern, NofM):
                continue
            assert _gone_by_class(grouping, keep, scope) == [
                int(sparsity * size + SLACK) for size in _gone_by_class(grouping, torch.zeros_like(keep), scope)
            ]
        if isinstance(pattern, NofM):
            _check_windows(pattern, grouping, keep, model)


def _next(model: Any, pattern: Any, grouping: Grouping, scores: Any, sparsity: float, scope: str, gone: Any) -> Any:
    classes = classes_of(grouping, scope)
    if isinstance(pattern, NofM):
        dims = input_dims(model, grouping)
        return allocate_windows(scores, grouping, pattern.window, sparsity, dims, Limits(), classes, removed_G=gone)
    return allocate(scores, grouping.set_sizes.tolist(), sparsity, Limits(), classes, gone)


def _gone_by_class(grouping: Grouping, keep: torch.Tensor, scope: str) -> list[int]:
    classes = classes_of(grouping, scope)
    counts = [0] * (int(classes.max()) + 1)
    for number, part in zip(classes.tolist(), torch.split(keep, grouping.set_sizes.tolist()), strict=True):
        counts[number] += int((~part).sum())
    return counts


def _check_windows(pattern: NofM, grouping: Grouping, keep: torch.Tensor, model: nn.Module) -> None:
    for member, dim in zip(grouping.members, input_dims(model, grouping), strict=True):
        rows = keep[member.offset : member.offset + member.n_slots].view(member.sizes).movedim(dim, -1)
        whole = rows[..., : rows.shape[-1] // pattern.of * pattern.of]
        gone = (~whole).unflatten(-1, (-1, pattern.of)).sum(-1)
        assert set(gone.unique().tolist()) <= {0, pattern.drop}
