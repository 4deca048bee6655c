"""Where second-order state lies, and how often the host asks (CUDA tensors without a GPU); batches against singles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from asking import Questions, pretend_cuda
from torch import Tensor, nn

from pruningawaretraining.criteria.second_order.bank import Bank, Budget, plan_passes
from pruningawaretraining.criteria.second_order.channels import Reader, compensate_readers, gate_scores, least_squares
from pruningawaretraining.criteria.second_order.fisher import GramFisher, Storage, inverse_by_triangles, inverse_of
from pruningawaretraining.criteria.second_order.layer_inputs import InputHessians
from pruningawaretraining.criteria.second_order.layerwise import FastCapSolver, SparseGptSolver
from pruningawaretraining.criteria.second_order.methods import CapMethod, ObsMethod
from pruningawaretraining.criteria.second_order.solve import BlockSolver, Candidates
from pruningawaretraining.criteria.second_order.sweep import Grid, Quota, damped, sweep, sweep_by, upper_factor
from pruningawaretraining.criteria.second_order.weights import PrunableWeight, prunable_weights
from pruningawaretraining.groups.grouping import Grouping, GroupSet
from pruningawaretraining.registry import build

DAMP = 1e-3
ON_CPU = Storage(torch.device("cpu"))


class Given:
    """Stands for the data: backward passes need a real device."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def each_gradient(self, parameters: Sequence[Tensor], count: int, consume: Callable[[list[Tensor]], None]) -> int:
        for _ in range(count):
            consume([torch.empty_like(one) for one in parameters])
        return count

    def run(self, count: int) -> None:
        for _ in range(count):
            self.model(torch.empty(4, 2, 6, 6))


def network(width: int) -> nn.Module:
    convolutions = nn.Conv2d(2, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 8, 3, groups=2)
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(8, 4))


def keep_all(layers: Sequence[Candidates], fraction: float) -> list[Tensor]:
    return [torch.ones_like(one.removed_N) for one in layers]


SOLVERS: dict[str, Callable[[list[PrunableWeight], Any], Any]] = {
    "obs": lambda weights, data: BlockSolver(weights, ObsMethod(), data, Budget(16, DAMP), keep_all),
    "cap": lambda weights, data: BlockSolver(weights, CapMethod(), data, Budget(16, DAMP), keep_all),
    "cap, few gradients": lambda weights, data: BlockSolver(weights, CapMethod(), data, Budget(4, DAMP), keep_all),
    "fast_cap": lambda weights, data: FastCapSolver(weights, data, 4, DAMP),
    "sparse_gpt": lambda weights, data: SparseGptSolver(weights, data, 2, DAMP),
}


def solved(name: str, pattern: str, width: int) -> tuple[Any, Questions]:
    with pretend_cuda() as questions:
        model = network(width)
        keep = {"2": torch.ones(8, width // 2, 3, 3, dtype=torch.bool)}
        weights = prunable_weights(model, build("pattern", pattern, "pattern"), 8, keep=keep)
        return SOLVERS[name](weights, Given(model)).solve([0.5, 0.75]), questions


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
def test_all_is_done_where_the_weights_are(name: str, pattern: str) -> None:
    """A tensor on the CPU among those of the GPU raises; what the host asks does not depend on the width."""
    found, few = solved(name, pattern, 4)
    for weights in found.values():
        for one in weights.values():
            assert one.weight_W.device.type == "cuda" and one.keep_W.device.type == "cuda"
    _, more = solved(name, pattern, 8)
    assert more.asked == few.asked
    layers, fractions = 3, 2
    assert few.asked["copy"] <= layers * fractions
    assert few.asked.total() <= 8 * layers * fractions


def test_a_device_that_is_asked_for_is_used() -> None:
    with pretend_cuda() as questions:
        model = network(4)
        weights = prunable_weights(model, build("pattern", "unstructured", "pattern"), 12)
        for storage, expected in ((Storage(), "cuda"), (ON_CPU, "cpu")):
            budget = Budget(16, DAMP, storage=storage)
            (spans,) = plan_passes(weights, budget)
            bank = Bank(spans, weights, budget).collect(Given(model))  # type: ignore[arg-type]
            assert {one.gram_BDD.device.type for one in bank.fishers.values() if isinstance(one, GramFisher)} == {
                expected
            }
        questions.asked.clear()
        solver = BlockSolver(weights, CapMethod(), Given(model), budget, keep_all)  # type: ignore[arg-type]
        found = solver.solve([0.5])
        assert {one.weight_W.device.type for one in found[0.5].values()} == {"cuda"}
        assert questions.asked["places"] == 0 and questions.asked["copy"] > 0


def test_spooled_blocks_are_worked_on_where_the_weights_are(tmp_path: Any) -> None:
    """What is on disk is the CPU's; its parts follow what they are asked for with."""
    fisher = GramFisher(2, 3, DAMP, Storage(folder=tmp_path))
    fisher.add(torch.randn(2, 5, 3))
    alive = torch.ones(2, 3, dtype=torch.bool, device="meta")
    assert fisher.squares(slice(0, 2), alive).device.type == "meta"
    assert fisher.gram_BDD.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squares_are_no_view_of_what_is_stored(dtype: torch.dtype) -> None:
    fisher = GramFisher(1, 3, DAMP, Storage(dtype=dtype))
    fisher.add(torch.randn(1, 5, 3))
    alive = torch.ones(1, 3, dtype=torch.bool)
    first = fisher.squares(slice(0, 1), alive).clone()
    assert torch.equal(fisher.squares(slice(0, 1), alive), first)


def test_one_solve_a_layer_makes_up_for_channels() -> None:
    """Whatever the width, the host asks once a layer: whether the factor was found."""
    asked = []
    for width in (6, 48):
        with pretend_cuda() as questions:
            layers = [nn.Conv2d(width, 5, 3), nn.Conv2d(width, 7, 3, bias=False)]
            hooks = InputHessians([(str(number), layer) for number, layer in enumerate(layers)], bias=True)
            for layer in layers:
                layer(torch.empty(2, width, 4, 4))
            hooks.remove()
            lost = torch.zeros(width, dtype=torch.bool)
            found = [Reader(str(number), layer, lost) for number, layer in enumerate(layers)]
            compensate_readers(found, hooks, least_squares)
            assert {one.weight.device.type for one in layers} == {"cuda"}
            asked.append(dict(+questions.asked))
    assert asked == [{"places": 2}] * 2


def test_gates_are_scored_where_their_gradients_are() -> None:
    with pretend_cuda() as questions:
        sets = (GroupSet("a", 0, 6, 1, "", ("a",)), GroupSet("b", 6, 10, 1, "", ("b",)))
        scores = gate_scores(torch.empty(5, 10), Grouping("channel", (), sets))
        assert scores.device.type == "cuda" and scores.dtype == torch.float64
        assert dict(+questions.asked) == {"places": 2}


@pytest.mark.parametrize("grid", [Grid(), Grid(2, 1), Grid(1, 1, 2, 4)], ids=str)
def test_matrices_swept_together_are_swept_one_by_one(grid: Grid) -> None:
    """One quota for all, so that counts are exact over them; each has its own Hessian."""
    torch.manual_seed(0)
    rows = torch.randn(3, 40, 12, dtype=torch.float64)
    hessians, matrices = damped(rows.mT @ rows, 0.01), torch.randn(3, 4, 12)
    alive = torch.rand(3, 4, 12) < (0.9 if grid.rows == 1 and not grid.of else 2.0)
    valid = torch.ones_like(alive)
    together = sweep_by(upper_factor(hessians, valid), matrices, alive, valid, grid, Quota(0.37))
    quota = Quota(0.37)
    for number in range(3):
        arguments = (one[number] for one in (matrices, hessians, alive, valid))
        weights, keep = sweep(*arguments, grid, quota)
        assert torch.equal(together[1][number], keep)
        assert torch.allclose(together[0][number], weights, atol=1e-12)


def test_inverse_by_triangles_is_that_of_cholesky() -> None:
    rows = torch.randn(3, 9, 5, dtype=torch.float64)
    lower = torch.linalg.cholesky(rows.mT @ rows)
    assert torch.allclose(inverse_by_triangles(lower), inverse_of(lower))
    assert torch.allclose(inverse_by_triangles(lower) @ (rows.mT @ rows), torch.eye(5, dtype=torch.float64), atol=1e-9)
