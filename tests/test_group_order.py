"""Groups that go one after the other: many sets at once against one group at a time, by plain formulas."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from device_meter import metered
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining.criteria.base import Statistics
from pruningawaretraining.criteria.second_order import reconstruction
from pruningawaretraining.criteria.second_order.group_order import (
    POOL,
    STEPS,
    IndexedReader,
    ReadSet,
    cheapest_first,
    diagonal_blocks,
    removal_losses,
)
from pruningawaretraining.criteria.second_order.layer_inputs import FEW, InputHessians, unfolded
from pruningawaretraining.criteria.second_order.listening import MOMENTS
from pruningawaretraining.criteria.second_order.reconstruction import Reconstruction
from pruningawaretraining.groups.grouping import Grouping, GroupSet, Member

Parts = list[tuple[Tensor, Tensor, int]]
"""Weights, inverse covariance and inputs of a group, of each reader of a set."""


def parts(groups: int, sizes: tuple[int, ...], seed: int = 0) -> Parts:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, size in enumerate(sizes):
        width = groups * size
        rows = torch.randn(2 * width, width, generator=generator, dtype=torch.float64)
        rows += torch.randn(2 * width, 1, generator=generator, dtype=torch.float64)
        weight = torch.randn(3 + number, width, generator=generator, dtype=torch.float64)
        found.append((weight, torch.linalg.inv(rows.mT @ rows / len(rows)), size))
    return found


def opened(readers: Parts, groups: int) -> ReadSet:
    return ReadSet([IndexedReader(weight.clone(), inverse.clone(), size) for weight, inverse, size in readers], groups)


def one_by_one(readers: Parts, groups: int) -> tuple[list[int], list[float]]:
    """The same by inverting what is left of the covariances before every step."""
    squares = [torch.linalg.inv(inverse) for _, inverse, _ in readers]
    left, order, losses = list(range(groups)), [], []

    def costs() -> dict[int, float]:
        found = dict.fromkeys(left, 0.0)
        for (weight, _, size), square in zip(readers, squares, strict=True):
            alive = torch.tensor([size * one + place for one in left for place in range(size)])
            inverse = torch.linalg.inv(square[alive][:, alive])
            fitted = weight @ square[:, alive] @ inverse  # least squares on what is left
            for number, group in enumerate(left):
                mine = slice(size * number, size * number + size)
                going = fitted[:, mine]
                found[group] += float((going @ torch.linalg.inv(inverse[mine, mine]) * going).sum())
        return found

    while left:
        alone = costs()
        pool = sorted(left, key=alone.__getitem__)[:POOL]
        for _ in range(min(STEPS, len(left))):
            now = costs()
            best = min(pool, key=now.__getitem__)
            order.append(best)
            losses.append(now[best])
            left.remove(best)
            pool.remove(best)
    return order, losses


@pytest.mark.parametrize(("groups", "sizes"), [(5, (1,)), (12, (3, 1)), (POOL + 5, (1,))])
def test_one_set_goes_as_one_group_at_a_time(groups: int, sizes: tuple[int, ...]) -> None:
    readers = parts(groups, sizes)
    ((order, losses),) = cheapest_first([opened(readers, groups)])
    expected, costs = one_by_one(readers, groups)
    assert order.tolist() == expected
    assert torch.allclose(losses, torch.tensor(costs, dtype=torch.float64), rtol=1e-8)


def test_sets_together_are_sets_alone_and_matrices_are_cut_down_on_the_way() -> None:
    """Of several sizes, so that some are done before others; the largest is cut down twice."""
    shapes = [(POOL, (2,)), (110, (1, 2)), (POOL + 1, (1,))]
    sets = [parts(groups, sizes, seed) for seed, (groups, sizes) in enumerate(shapes)]
    together = cheapest_first([opened(one, groups) for one, (groups, _) in zip(sets, shapes, strict=True)])
    for one, (groups, _), (order, losses) in zip(sets, shapes, together, strict=True):
        ((alone, costs),) = cheapest_first([opened(one, groups)])
        assert sorted(order.tolist()) == list(range(groups))
        assert torch.equal(order, alone)
        assert torch.allclose(losses, costs, rtol=1e-9)
        # All that goes costs what there is: the variance of the outputs.
        total = sum(float((weight @ torch.linalg.inv(inverse) * weight).sum()) for weight, inverse, _ in one)
        assert float(losses.sum()) == pytest.approx(total, rel=1e-8)


def test_losses_are_those_of_a_solve() -> None:
    root = torch.randn(4, 6, 6, dtype=torch.float64)
    square, gram = root @ root.mT + torch.eye(6), torch.randn(4, 6, 6, dtype=torch.float64)
    expected = torch.linalg.solve(square, gram).diagonal(dim1=-2, dim2=-1).sum(-1)
    assert torch.allclose(removal_losses(square, gram), expected)
    blocks = diagonal_blocks(square, 2)
    assert torch.equal(blocks[1, 2], square[1, 4:6, 4:6]) and blocks.shape == (4, 3, 2, 2)


@pytest.mark.parametrize("groups", [POOL, 70])
def test_on_a_gpu_all_stays_there_and_nothing_is_asked(groups: int) -> None:
    with metered() as meter:
        with torch.device("cuda"):
            sets = [
                ReadSet(
                    [
                        IndexedReader(torch.ones(9, count * size).double(), torch.eye(count * size).double(), size)
                        for size in sizes
                    ],
                    count,
                )
                for count, sizes in ((groups, (1, 3)), (POOL, (3,)))
            ]
        meter.start()
        found = cheapest_first(sets)
        assert [order.shape[0] for order, _ in found] == [groups, POOL]
        assert all(one.device.type == "cuda" for pair in found for one in pair)
        assert not meter.waits


def scored(sizes: Sequence[int], members: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Scores of sets of some sizes, by (weights, group of each input) of the layers that read them."""
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    sets = tuple(GroupSet(str(start), start, start + size) for start, size in zip(starts, sizes, strict=True))
    total = sum(sizes)
    reading, tensors = [], {}
    for number, (weight, groups) in enumerate(members):
        name = f"{number}.weight"
        reading.append(Member.along(name, weight, 1, groups, total, "in"))
        rows = torch.randn(400, weight.shape[1], generator=torch.Generator().manual_seed(number))
        rows = functional.pad(rows + rows[:, :1], (0, 1), value=1.0).double()
        tensors[f"{MOMENTS}.{name}"] = rows.mT @ rows / len(rows)
    return Reconstruction().score(Grouping("channel", tuple(reading), sets), Statistics(tensors=tensors))


def test_what_is_worked_on_together_changes_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three layers that read four sets, one of them two; sets of one batch, and each alone."""
    torch.manual_seed(0)
    first, second = torch.arange(40), torch.cat([torch.arange(40, 76), torch.arange(76, 90)])
    members = [(torch.randn(5, len(one)), one) for one in (first, second, torch.arange(90, 99), first)]
    together = scored((40, 36, 14, 9), members)
    monkeypatch.setitem(reconstruction.TOGETHER, "cpu", 0)
    assert torch.allclose(scored((40, 36, 14, 9), members), together, rtol=1e-9)
    assert bool((together > 0).all())


def test_groups_of_unequal_numbers_of_inputs_are_filled_up_with_what_costs_nothing() -> None:
    """A group that is read twice beside others that are read once, in any order of the inputs; one is not read."""
    torch.manual_seed(0)
    weight, groups = torch.randn(4, 6), torch.tensor([2, 0, 1, 2, 4, 0])
    found = scored((4, 1), [(weight, groups)])
    rows = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    rows = (rows + rows[:, :1]).double()
    square = (rows - rows.mean(0)).mT @ (rows - rows.mean(0)) / 400
    square.diagonal().add_(1e-3 * square.diagonal().mean())
    weight = weight.double() / ((weight.double() @ (rows - rows.mean(0)).mT).square().mean(1).sum().sqrt())
    inverse = torch.linalg.inv(square)

    def cost(inputs: list[int]) -> float:
        own = weight[:, inputs]
        return float((own @ torch.linalg.inv(inverse[inputs][:, inputs]) * own).sum())

    assert float(found[4]) == pytest.approx(cost([4]), rel=1e-6)
    # In this order they go; what has gone, has gone together.
    assert float(found[3]) < 1e-9 < float(found[:3].min())
    assert float(found[:4].sum()) == pytest.approx(cost([0, 1, 2, 3, 5]), rel=1e-6)


def plain_moments(layer: nn.Module, batches: list[Tensor]) -> Tensor:
    rows = torch.cat([functional.pad(unfolded(layer, one), (0, 1), value=1.0).double() for one in batches], 1)
    return rows.mT @ rows * (2 / rows.shape[1])


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (1, 40, 1), (20, 25, 2), (2,)])
def test_moments_of_few_and_of_many_positions(sizes: tuple[int, ...]) -> None:
    """Inputs are kept until there are many: none is lost, and none is counted twice."""
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 4, 3, groups=2)
    batches = [torch.randn(size, 6, 4, 4) for size in sizes]
    hooks = InputHessians([("layer", layer)], bias=True)
    for one in batches:
        layer(one)
    hooks.remove()
    few = all(4 * size < FEW for size in sizes)
    assert torch.allclose(hooks.hessian("layer"), plain_moments(layer, batches), atol=1e-12 if few else 1e-5)


def test_inputs_that_are_overwritten_later_are_kept_as_they_were() -> None:
    layer = nn.Linear(8, 3)
    x = torch.randn(2, 8)
    before = x.clone()
    hooks = InputHessians([("layer", layer)])
    layer(x)
    x.zero_()
    hooks.remove()
    assert torch.allclose(hooks.hessian("layer")[0], (before.T @ before).double())
