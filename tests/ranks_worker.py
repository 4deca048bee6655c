"""Trainings that are the same on one process and on several: run by test_ranks.py.

Every process takes its share of the same global batches. There is no batch norm, whose statistics would be of a share.
"""

from __future__ import annotations

from typing import Any

import moe
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from pruningawaretraining import Pruning
from pruningawaretraining.distributed.collectives import rank, world_size
from pruningawaretraining.distributed.ddp import rewrap_in_place
from pruningawaretraining.errors import PruningError
from pruningawaretraining.proximal import PruneOptimizer

BATCH, EPOCHS, STEPS = 16, 4, 2
SCHEDULE = {"start": 1, "end": 2, "schedule": "linear"}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 16), nn.ReLU(),
        nn.Linear(16, 3),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(functional.relu(self.up(x))))


def residual_network() -> nn.Module:
    torch.manual_seed(0)
    blocks = [Residual() for _ in range(4)]
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 8), *blocks, nn.Linear(8, 3))


def expert_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), moe.MoeNet(72, 3))


NETWORKS = {"layers": network, "blocks": residual_network, "experts": expert_network}


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(BATCH, 2, 6, 6, generator=generator)
    return inputs, torch.randint(3, (BATCH,), generator=generator)


def share(number: int) -> tuple[Tensor, Tensor]:
    inputs, targets = batch(number)
    return inputs[rank() :: world_size()], targets[rank() :: world_size()]


class Data:
    """What curvature is measured on: every process its part, in single samples."""

    def __iter__(self) -> Any:
        return iter([share(100 + number) for number in range(4)])


def step(network: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    inputs, targets = share(number)
    optimizer.zero_grad()
    functional.cross_entropy(network(inputs), targets).backward()
    optimizer.step()


def wrap(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, bucket_cap_mb=1, gradient_as_bucket_view=True) if world_size() > 1 else model


def pruned(
    rule: dict[str, Any], calibrated: bool = False, in_place: bool = False, of: str = "layers"
) -> dict[str, Any]:
    """A training with masks, and with a removal where there are channels, blocks or experts."""
    model = NETWORKS[of]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=batch(0)[0][:1], optimizer=optimizer)
    if calibrated:
        pruner.calibrate_with(Data(), functional.cross_entropy)
    wrapped = wrap(model)
    for epoch in range(EPOCHS):
        for number in range(STEPS):
            step(wrapped, optimizer, epoch * STEPS + number)
        pruner.prune(wrapped, epoch)
        if in_place:
            rewrap_in_place(wrapped)
        else:
            wrapped = pruner.rewrap(wrapped)
    return {"masks": pruner.masks, "model": model.state_dict(), "phase": pruner.phase}


def proximal(options: dict[str, Any]) -> dict[str, Any]:
    """A training with proximal steps: a group is 0 or not."""
    model = network()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], **options},
        {"params": [p for p in model.parameters() if p.dim() == 1]},
    ]
    optimizer = PruneOptimizer(torch.optim.SGD(groups, lr=0.05, momentum=0.9), 1, 8)
    wrapped = wrap(model)
    for number in range(EPOCHS * STEPS):
        step(wrapped, optimizer, number)
    masks = {name: value != 0 for name, value in model.named_parameters() if value.dim() > 1}
    return {"masks": masks, "model": model.state_dict(), "phase": "finetune"}


def run(case: dict[str, Any]) -> dict[str, Any]:
    """One training; a refusal is a result too."""
    try:
        if "proximal" in case:
            return proximal(case["proximal"])
        return pruned(**case)
    except PruningError as error:
        return {"refused": f"{type(error).__name__}: {error}"}


def run_all(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The trainings by name."""
    return {name: run(case) for name, case in cases.items()}
