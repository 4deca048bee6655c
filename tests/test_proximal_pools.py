"""Small weights worked on together, as on a GPU: the same weights come out as one by one, by fewer operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from proximal_cases import PAIRS, SHAPES, Operations, coupled_grouper, fields, shapes_for
from torch import Tensor, nn

from pruningawaretraining.groups import kernels as fused
from pruningawaretraining.proximal import PruneOptimizer, element_plans, pools, stages
from pruningawaretraining.proximal.groupers import Dim0Grouper, GroupView, KElementGrouper
from pruningawaretraining.proximal.maps import removed_count
from pruningawaretraining.proximal.options import read_options
from pruningawaretraining.proximal.pools import Form
from pruningawaretraining.proximal.prox_groups import Unit
from pruningawaretraining.proximal.runs import Runs

LAYOUTS = ("contiguous", "channels_last", "mixed", "gaps")
PRECISIONS = [
    *((prox, torch.bfloat16) for prox in ("ProxLasso", "ProxGroupLasso", "NMSparseConstraint")),
    *((prox, torch.float32) for prox in ("ProxLasso", "ProxGroupLasso", "NMSparseConstraint", "MinSparsityConstraint")),
]
"""Norms of half-precision weights are often equal, and which of equals goes is open."""


def filled(shape: Sequence[int], layout: str, index: int, ties: bool) -> Tensor:
    """Random values; with ties, some are equal in magnitude or 0 (which of equal norms goes is open)."""
    generator = torch.Generator().manual_seed(index)
    values = torch.randn(shape, generator=generator)
    if ties:
        values = torch.where(torch.rand(shape, generator=generator) < 0.3, (2 * values).round() / 2, values)
    if layout == "gaps":
        return torch.cat([values, values], -1).narrow(-1, 0, shape[-1])
    last = layout == "channels_last" or (layout == "mixed" and index % 2)
    return values.contiguous(memory_format=torch.channels_last) if last and values.dim() == 4 else values


def images(grouper: Any, prox: str, latents: Sequence[Tensor], pool: bool, **options: Any) -> tuple[list[Tensor], int]:
    """The weights after the map, and how many operations it took (of a plan that was made before)."""
    name = grouper if isinstance(grouper, str) else "CoupledChannelGrouper"
    scale = options.pop("scale", 0.1)
    group = {"group_type": grouper, "prox_type": prox, **fields(name), **options}
    if isinstance(grouper, str):
        group["params"] = [torch.empty_like(one).normal_() for one in latents]
    else:
        group["params"] = grouper.parameters()
    unit = Unit([0], read_options(group, "here", False), pool)
    plan = unit.plan(unit.places([group]), [one.clone() for one in latents])
    plan.run(scale, unit.options.prox.target)
    with Operations() as operations:
        plan.run(scale, unit.options.prox.target)
    return [weight.detach().clone() for weight in group["params"]], operations.total


def check(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    for found, expected in zip(one, other, strict=True):
        close = {"rtol": 1e-2, "atol": 1e-3} if found.dtype in (torch.bfloat16, torch.float16) else {}
        torch.testing.assert_close(found, expected, **close)
        assert torch.equal(found == 0, expected == 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("grouper", "prox"), [pair for pair in PAIRS if pair[0] != "CoupledChannelGrouper"])
def test_weights_together_are_as_one_by_one(
    grouper: str, prox: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "kernels", lambda: None)
    ties = prox == "NMSparseConstraint"
    latents = [filled(shape, layout, index, ties) for index, shape in enumerate(shapes_for(grouper))]
    together, few = images(grouper, prox, latents, True)
    alone, many = images(grouper, prox, latents, False)
    check(together, alone)
    if layout == "contiguous" and "SVD" not in grouper:
        assert few < many


@pytest.mark.parametrize(
    "options",
    [
        {"gamma_index_slope": 0.5},
        {"scale": torch.tensor(0.1, dtype=torch.float64)},
        {"scale": 0.0},
        {"scale": 10.0},
        {"min_sparsity": 1.0},
        {"min_sparsity": 0.0},
        {"k": 5},
        {"n_nonzero": 0},
        {"n_nonzero": 1},
        {"n_nonzero": 4},
        {"k": 2, "n_nonzero": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize(("prox", "dtype"), PRECISIONS)
@pytest.mark.parametrize("grouper", ["KElementGrouper", "Dim0Grouper"])
def test_options_count_the_same_together(grouper: str, prox: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    latents = [filled(shape, "mixed", index, False).to(dtype) for index, shape in enumerate(SHAPES)]
    check(images(grouper, prox, latents, True, **options)[0], images(grouper, prox, latents, False, **options)[0])


@pytest.mark.parametrize("prox", [prox for grouper, prox in PAIRS if grouper == "CoupledChannelGrouper"])
@pytest.mark.parametrize("options", [{}, {"relative": True}, {"max_sparsity": 0.7}], ids=str)
def test_coupled_channels_together_are_as_one_by_one(prox: str, options: dict[str, Any]) -> None:
    grouper = coupled_grouper(**options)
    latents = [torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) for p in grouper.parameters()]
    together, few = images(grouper, prox, latents, True, scale=1.0)
    alone, many = images(grouper, prox, latents, False, scale=1.0)
    check(together, alone)
    assert any(bool((weight == 0).any()) for weight in alone)
    assert few < many


@pytest.mark.parametrize(("grouper", "prox"), [pair for pair in PAIRS if pair[0] in ("Dim0Grouper", "KElementGrouper")])
def test_large_weights_stay_alone_and_pools_are_bounded(
    grouper: str, prox: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "ALONE", 1000)
    monkeypatch.setattr(stages, "CAPACITY", 1200)
    monkeypatch.setattr(element_plans, "ALONE", 1000)
    monkeypatch.setattr(element_plans, "PASSING", 1100)
    latents = [filled(shape, "contiguous", index, False) for index, shape in enumerate(SHAPES)]
    check(images(grouper, prox, latents, True)[0], images(grouper, prox, latents, False)[0])


def test_pools_hold_no_more_than_their_capacity() -> None:
    weights = [(torch.randn(size), torch.empty(size)) for size in (10, 30, 20, 25, 200)]
    jobs = [
        pools.Job.of(index, pair, [(GroupView(pair[0], ()), GroupView(pair[1], ()))])
        for index, pair in enumerate(weights)
    ]
    first = pools.pooled(jobs, 100, 50, several=False)
    assert [pool.indices for pool in first] == [[0, 2]]
    several = pools.pooled(jobs, 100, 50, several=True)
    assert [pool.indices for pool in several] == [[0, 2], [3], [1]]
    assert len({pool.buffer_N.untyped_storage().data_ptr() for pool in several}) == 1
    assert several[0].buffer_N.untyped_storage().nbytes() == 4 * 30
    for pool in several:
        pool.load()
        pool.buffer_N.mul_(2)
        pool.store()
    for index, (source, target) in enumerate(weights[:4]):
        assert torch.equal(target, 2 * source), index


def test_the_form_of_rows_and_of_groups_of_four() -> None:
    plain = torch.empty(16, 8, 3, 3)
    last = plain.contiguous(memory_format=torch.channels_last)
    assert Form.of(Dim0Grouper().blocks(plain)[0]) == Form(16, (72,), (1,), True, True)
    assert Form.of(Dim0Grouper().blocks(last)[0]) == Form(16, (72,), (1,), True, False)
    assert Form.of(KElementGrouper(4).blocks(plain)[0]) == Form(32, (4, 9), (1,), True, True)
    assert Form.of(KElementGrouper(4).blocks(last)[0]) == Form(288, (4,), (1,), False, True)
    assert Form.of(Dim0Grouper().blocks(plain[:, ::2])[0]) is None
    assert Form.of(Dim0Grouper().blocks(torch.empty(0, 3))[0]) is None


@pytest.mark.parametrize("fraction", [0.0, 0.07, 0.29, 0.5, 1.0])
def test_runs_lose_their_smallest_each_to_the_count(fraction: float) -> None:
    sizes = [100, 7, 1, 64]
    stops = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    runs = [slice(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
    norms_G = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(0))
    made = Runs.on(runs, torch.device("cpu"))
    assert made is not None
    keep_G = made.keep_largest(norms_G, fraction, 1e-6)
    for run, size in zip(runs, sizes, strict=True):
        gone = removed_count(fraction, size)
        assert int((keep_G[run] == 0).sum()) == gone
        expected = torch.ones(size).index_fill_(0, norms_G[run].argsort()[:gone], 0.0)
        assert torch.equal(keep_G[run], expected)


def test_a_gamma_on_the_device_is_added_to_in_place_and_saved_as_it_was() -> None:
    """A captured step is replayed on the same memory: the sum of learning rates has to be there."""
    weight = nn.Parameter(torch.ones(4, 4))
    group = {"params": [weight], "group_type": "Dim0Grouper", "prox_type": "ProxGroupLasso", "reg_lambda": 0.1}
    optimizer = PruneOptimizer(torch.optim.Adam([group], lr=torch.tensor(0.5), capturable=False, foreach=False))
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    gamma, saved = optimizer.param_groups[0]["gamma"], optimizer.state_dict()["param_groups"][0]["gamma"]
    optimizer.step()
    optimizer.param_groups[0]["lr"].fill_(0.25)
    optimizer.step()
    assert optimizer.param_groups[0]["gamma"] is gamma
    assert float(gamma) == 1.25
    assert float(saved) == 0.5
    torch.testing.assert_close(weight.detach(), torch.ones(4, 4) * (1 - 0.125 * 2 / 2))
