"""Run by test_channel_ranks.py on one process and on several: channels pruned in a data-parallel training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from pruningawaretraining import Pruning
from pruningawaretraining.distributed import collectives

EPOCHS, STEPS, BATCH = 5, 3, 8
RULE = {
    "regularizer": {"type": "growing_l2", "strength": 1e-3},
    "start": 1, "end": 3, "target": {"macs": 0.5}, "final_sparsity": 0.7,
}  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 16), nn.ReLU(),
        nn.Linear(16, 3),
    )  # fmt: skip


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(BATCH, 2, 8, 8, generator=generator), torch.randint(3, (BATCH,), generator=generator)


def train(criterion: str) -> dict[str, Any]:
    """One training; every process takes its share of each batch."""
    rank, ranks = collectives.rank(), collectives.world_size()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    config = {"rules": [{**RULE, "criterion": criterion}]}
    pruner = Pruning(model, config, example_inputs=batch(0)[0][:1], optimizer=optimizer)
    wrapped: nn.Module = DistributedDataParallel(model) if ranks > 1 else model
    for epoch in range(EPOCHS):
        for step in range(STEPS):
            inputs, targets = batch(epoch * STEPS + step)
            optimizer.zero_grad()
            functional.cross_entropy(wrapped(inputs[rank::ranks]), targets[rank::ranks]).backward()
            optimizer.step()
        widths = [parameter.shape for parameter in model.parameters()]
        pruner.prune(wrapped, epoch)
        if ranks > 1 and [parameter.shape for parameter in model.parameters()] != widths:
            wrapped = DistributedDataParallel(model)
    return {"masks": pruner.masks, "model": model.state_dict(), "phase": pruner.phase}
