"""Runs on every rank of :mod:`test_proximal_sharded`: trains sharded weights beside whole ones and compares them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from pruningawaretraining.proximal import CoupledChannelGrouper, PruneOptimizer

LASSO = {"prox_type": "ProxGroupLasso"}
CASES: dict[str, dict[str, Any]] = {
    "rows": {"group_type": "Dim0Grouper", "prox_type": "ProxGroupLasso"},
    "columns": {"group_type": "Dim1Grouper", "prox_type": "ProxGroupLasso"},
    "elements": {"group_type": "ElemGrouper", "prox_type": "ProxLasso"},
    "elements sloped": {"group_type": "ElemGrouper", "prox_type": "ProxLasso", "gamma_index_slope": 0.5},
    "layer": {"group_type": "LayerGrouper", "prox_type": "ProxGroupLasso", "reg_lambda": 3.0},
    "kernels": {"group_type": "ConvFilterGrouper", "prox_type": "ProxGroupLasso"},
    "blocks": {"group_type": "KElementGrouper", "k": 4, "prox_type": "ProxGroupLasso"},
    "heads": {"group_type": "AttentionHeadGrouperDim0", "num_heads": 3, "npack": 1, **LASSO},
    "head columns": {"group_type": "AttentionHeadGrouperDim1", "num_heads": 2, "npack": 1, **LASSO},
    "half of the rows": {"group_type": "Dim0Grouper", "prox_type": "MinSparsityConstraint", "min_sparsity": 0.5},
    "half of the columns": {"group_type": "Dim1Grouper", "prox_type": "MinSparsityConstraint", "min_sparsity": 0.5},
    "half of all": {"group_type": "Dim0Grouper", "prox_type": "GlobalMinSparsityConstraint", "min_sparsity": 0.5},
    "2:4": {"group_type": "KElementGrouper", "k": 4, "prox_type": "NMSparseConstraint", "n_nonzero": 2},
    "rows sloped": {
        "group_type": "Dim0Grouper",
        "prox_type": "ProxGroupLasso",
        "gamma_index_slope": 0.8,
        "reg_lambda": 12.0,
    },
    "nuclear norm": {"group_type": "SVDGrouper", "prox_type": "ProxNuclearNorm", "reg_lambda": 2.0},
    "rank": {"group_type": "SVDGrouper", "prox_type": "MinRankConstraint", "min_sparsity": 0.5},
    "packed rank": {
        "group_type": "PackedSVDGrouper",
        "npack": 3,
        "prox_type": "MinRankConstraint",
        "min_sparsity": 0.5,
    },
}
SHAPES = [(9, 8, 3, 3), (6, 8, 1, 1), (3, 8, 2, 2)]
MATRICES = [(6, 8), (9, 4)]
STEPS, WARMUP, HEALING = 6, 1, 5


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(params: list[nn.Parameter], options: dict[str, Any], place: Any) -> PruneOptimizer:
    """A run with gradients that all ranks agree on; ``place`` shards a tensor as its parameter is."""
    groups = [{"params": params, "reg_lambda": 5.0, **options}]
    optimizer = PruneOptimizer(torch.optim.AdamW(groups, lr=0.05), WARMUP, HEALING)
    for step in range(STEPS):
        for number, parameter in enumerate(params):
            parameter.grad = place(values(tuple(parameter.shape), 100 * step + number), parameter)
        optimizer.step()
    return optimizer


def check_case(name: str, mesh: Any, placements: Any) -> None:
    shapes = MATRICES if "packed" in name else SHAPES
    plain = [nn.Parameter(values(shape, number)) for number, shape in enumerate(shapes)]
    sharded = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, placements)) for p in plain]
    whole = trained(plain, CASES[name], lambda tensor, _: tensor)
    parts = trained(sharded, CASES[name], lambda tensor, _: distribute_tensor(tensor, mesh, placements))
    for mine, theirs in zip(sharded, plain, strict=True):
        torch.testing.assert_close(mine.full_tensor(), theirs, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")
    assert abs(parts.relative_sparsity - whole.relative_sparsity) < 1e-6, name
    if name != "layer" and "SVD" not in CASES[name]["group_type"]:
        assert whole.relative_sparsity > 0.05, (name, whole.relative_sparsity)
    assert parts.parameter_sparsity().keys() == whole.parameter_sparsity().keys()


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 9, 3, padding=1)
        self.norm = nn.BatchNorm2d(9)
        self.inner = nn.Conv2d(9, 5, 1)
        self.outer = nn.Conv2d(5, 9, 3, padding=1)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        return self.head(x.mean((2, 3)))


def check_fsdp(mesh: Any) -> None:
    """Coupled channels of a model under FSDP2, trained for real, beside the same model on one rank."""
    from torch.distributed.fsdp import fully_shard

    runs = []
    for shard in (False, True):
        torch.manual_seed(0)
        model = Stream()
        grouper = CoupledChannelGrouper(model, torch.zeros(1, 3, 8, 8), max_sparsity=1.0)
        if shard:
            fully_shard(model.inner, mesh=mesh)
            fully_shard(model, mesh=mesh)
            assert grouper.rebind(model)
        groups = grouper.param_groups(reg_lambda=1.0)
        optimizer = PruneOptimizer(torch.optim.SGD(groups, lr=0.1, momentum=0.9), WARMUP, HEALING)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = model(values((4, 3, 8, 8), step)).square().mean()
            loss.backward()
            optimizer.step()
        runs.append((model, optimizer))
    (whole, plain), (parts, sharded) = runs
    for (name, mine), theirs in zip(parts.named_parameters(), whole.parameters(), strict=True):
        full = mine.full_tensor() if hasattr(mine, "full_tensor") else mine
        torch.testing.assert_close(full, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert plain.relative_sparsity > 0.2
    assert abs(sharded.relative_sparsity - plain.relative_sparsity) < 1e-6


def check_refusal(mesh: Any) -> None:
    """Groups of four that a shard cuts cannot be ranked on one rank."""
    from pruningawaretraining.errors import ModelError

    weight = nn.Parameter(distribute_tensor(values((4, 12), 0), mesh, [Shard(1)]))
    weight.grad = distribute_tensor(values((4, 12), 1), mesh, [Shard(1)])
    optimizer = PruneOptimizer(torch.optim.SGD([{"params": [weight], **CASES["2:4"]}], lr=0.1))
    try:
        optimizer.step()
    except ModelError as error:
        assert "shards cut groups" in str(error)
    else:
        raise AssertionError("a cut group was not refused")


def check(what: str) -> None:
    """Every case with weights placed like this."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    placements = {"rows": [Shard(0)], "columns": [Shard(1)], "whole": [Replicate()]}[what]
    for name in CASES:
        check_case(name, mesh, placements)
    if what == "rows":
        check_fsdp(mesh)
        check_refusal(mesh)
