"""Where second-order state lies, and how often the host asks (CUDA tensors without a GPU); batches against singles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from device_meter import metered
from second_device import second_device
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pruningawaretraining.criteria.second_order.bank import Bank, Budget, plan_passes
from pruningawaretraining.criteria.second_order.channels import (
    LosingReader,
    compensate_readers,
    gate_scores,
    least_squares,
)
from pruningawaretraining.criteria.second_order.fisher import GramFisher, Storage, inverse_by_triangles, inverse_of
from pruningawaretraining.criteria.second_order.layer_inputs import InputHessians
from pruningawaretraining.criteria.second_order.layerwise import FastCapSolver, SparseGptSolver
from pruningawaretraining.criteria.second_order.methods import CapMethod, ObsMethod
from pruningawaretraining.criteria.second_order.solve import BlockSolver, Candidates
from pruningawaretraining.criteria.second_order.sweep import Grid, Quota, damped, sweep, sweep_by, upper_factor
from pruningawaretraining.criteria.second_order.weights import PrunableWeight, prunable_weights
from pruningawaretraining.groups.grouping import Grouping, GroupSet
from pruningawaretraining.one_shot import one_shot
from pruningawaretraining.registry import build

DAMP = 1e-3


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
            self.model(torch.empty(4, 2, 6, 6, device="cuda"))


def network(width: int) -> nn.Module:
    convolutions = nn.Conv2d(2, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 8, 3, groups=2)
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(8, 4))


def network_there(width: int) -> nn.Module:
    with torch.device("cuda"):
        return network(width)


def keep_all(layers: Sequence[Candidates], fraction: float) -> list[Tensor]:
    return [torch.ones_like(one.removed_N) for one in layers]


SOLVERS: dict[str, Callable[[list[PrunableWeight], Any], Any]] = {
    "obs": lambda weights, data: BlockSolver(weights, ObsMethod(), data, Budget(16, DAMP), keep_all),
    "cap": lambda weights, data: BlockSolver(weights, CapMethod(), data, Budget(16, DAMP), keep_all),
    "cap, few gradients": lambda weights, data: BlockSolver(weights, CapMethod(), data, Budget(4, DAMP), keep_all),
    "fast_cap": lambda weights, data: FastCapSolver(weights, data, 4, DAMP),
    "sparse_gpt": lambda weights, data: SparseGptSolver(weights, data, 2, DAMP),
}


def solved(name: str, pattern: str, width: int) -> tuple[Any, Counter[str]]:
    with metered() as meter:
        model = network_there(width)
        keep = {"2": torch.ones(8, width // 2, 3, 3, dtype=torch.bool, device="cuda")}
        weights = prunable_weights(model, build("pattern", pattern, "pattern"), 8, keep=keep)
        meter.start()
        return SOLVERS[name](weights, Given(model)).solve([0.5, 0.75]), meter.waits


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
def test_all_is_done_where_the_weights_are(name: str, pattern: str) -> None:
    """A tensor on the CPU among those of the GPU raises; how often the host waits does not depend on the width."""
    found, few = solved(name, pattern, 4)
    for weights in found.values():
        for one in weights.values():
            assert one.weight_W.device.type == "cuda" and one.keep_W.device.type == "cuda"
    assert solved(name, pattern, 8)[1] == few
    layers, fractions = 3, 2
    assert 0 < few.total() <= 4 * layers * fractions


def test_a_device_that_is_asked_for_is_used() -> None:
    with metered() as meter:
        model = network_there(4)
        weights = prunable_weights(model, build("pattern", "unstructured", "pattern"), 12)
        for storage, expected in ((Storage(), "cuda"), (Storage(torch.device("cpu")), "cpu")):
            budget = Budget(16, DAMP, storage=storage)
            (spans,) = plan_passes(weights, budget)
            bank = Bank(spans, weights, budget).collect(Given(model))  # type: ignore[arg-type]
            grams = [one.gram_BDD for one in bank.fishers.values() if isinstance(one, GramFisher)]
            assert {one.device.type for one in grams} == {expected} and len(grams) == 3
        meter.start()
        solver = BlockSolver(weights, CapMethod(), Given(model), budget, keep_all)  # type: ignore[arg-type]
        found = solver.solve([0.5])
        assert {one.weight_W.device.type for one in found[0.5].values()} == {"cuda"}
        assert not any("linalg" in name for name in meter.calls)


def test_spooled_blocks_are_worked_on_where_the_weights_are(tmp_path: Path) -> None:
    """What is on disk is the CPU's; its parts follow what they are asked for with."""
    fisher = GramFisher(2, 3, DAMP, Storage(folder=tmp_path))
    fisher.add(torch.randn(2, 5, 3))
    with second_device() as device:
        alive = torch.ones(2, 3, dtype=torch.bool, device=device)
        assert fisher.inverses(slice(0, 2), alive).device == device
    assert fisher.gram_BDD.device.type == "cpu"


CRITERIA = [
    {"type": "obs", "num_grads": 24, "damp": 1e-3, "fisher_block_size": 16},
    {"type": "cap", "num_grads": 24, "damp": 1e-3, "fisher_block_size": 16},
    {"type": "cap", "num_grads": 24, "damp": 1e-3, "fisher_block_size": 16, "fisher_inv_device": "cpu"},
    {"type": "cap", "num_grads": 8, "damp": 1e-3, "fisher_block_size": 16},
    {"type": "fast_cap", "num_grads": 24},
    {"type": "sparse_gpt", "num_grads": 4},
]


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda one: f"{one['type']}-{len(one)}-{one['num_grads']}")
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "2x1"])
def test_a_second_device_finds_what_the_cpu_finds(criterion: dict[str, Any], pattern: str) -> None:
    rule = {"pattern": pattern, "criterion": criterion, "target": {"sparsity": 0.5}}

    def pruned(device: torch.device | str) -> nn.Module:
        torch.manual_seed(0)
        model = network(6).to(device)
        data = [(torch.randn(4, 2, 6, 6).to(device), torch.randint(0, 4, (4,)).to(device)) for _ in range(24)]
        return one_shot(model, rule, data, cross_entropy, [0.5])[0.5]

    here = pruned("cpu")
    with second_device() as device:
        there = pruned(device).to("cpu")
        for expected, found in zip(here.parameters(), there.parameters(), strict=True):
            assert torch.allclose(found, expected, atol=1e-5)


def test_channels_are_made_up_for_on_a_second_device_as_on_the_cpu() -> None:
    rule = {"criterion": "reconstruction", "compensation": "least_squares", "target": {"macs": 0.5}}

    def pruned(device: torch.device | str) -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Conv2d(2, 40, 3), nn.ReLU(), nn.Conv2d(40, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(1)
        model = nn.Sequential(*layers, nn.Linear(8, 4)).to(device)
        data = [(torch.randn(16, 2, 7, 7).to(device), torch.randint(0, 4, (16,)).to(device)) for _ in range(4)]
        (found,) = one_shot(model, rule, data, cross_entropy).values()
        return found

    here = pruned("cpu")
    with second_device() as device:
        there = pruned(device).to("cpu")
        for expected, found in zip(here.parameters(), there.parameters(), strict=True):
            assert found.shape == expected.shape
            assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squares_are_no_view_of_what_is_stored(dtype: torch.dtype) -> None:
    fisher = GramFisher(1, 3, DAMP, Storage(dtype=dtype))
    fisher.add(torch.randn(1, 5, 3))
    alive = torch.ones(1, 3, dtype=torch.bool)
    first = fisher.squares(slice(0, 1), alive).clone()
    assert torch.equal(fisher.squares(slice(0, 1), alive), first)


def test_one_solve_a_layer_makes_up_for_channels() -> None:
    """Whatever the width, there is one factor and one solve a layer, and the host waits for whether it was found."""
    for width in (6, 48):
        with metered() as meter:
            with torch.device("cuda"):
                layers = [nn.Conv2d(width, 5, 3), nn.Conv2d(width, 7, 3, bias=False)]
            hooks = InputHessians([(str(number), layer) for number, layer in enumerate(layers)], bias=True)
            for layer in layers:
                layer(torch.empty(2, width, 4, 4, device="cuda"))
            hooks.remove()
            lost = torch.zeros(width, dtype=torch.bool)
            found = [LosingReader(str(number), layer, lost) for number, layer in enumerate(layers)]
            meter.start()
            compensate_readers(found, hooks, least_squares)
            assert {one.weight.device.type for one in layers} == {"cuda"}
            assert meter.calls["aten.linalg_cholesky_ex.default"] == meter.calls["aten.cholesky_solve.default"] == 2
            reads = [count for name, count in meter.waits.items() if "copy" not in name]
            assert sum(reads) == 2  # the copies bring the masks of channels there


def test_gates_are_scored_where_their_gradients_are() -> None:
    with metered() as meter:
        sets = (GroupSet("a", 0, 6, 1, "", ("a",)), GroupSet("b", 6, 10, 1, "", ("b",)))
        scores = gate_scores(torch.empty(5, 10, device="cuda"), Grouping("channel", (), sets))
        assert scores.device.type == "cuda" and scores.dtype == torch.float64
        assert meter.waits.total() == 2  # whether each set's factor was found


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
