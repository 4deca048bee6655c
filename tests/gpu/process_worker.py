"""Run by test_gpu_processes.py: one process of a group (nccl on a GPU, gloo on the CPU) trains under DDP or FSDP2.

python process_worker.py ddp|fsdp cuda|cpu FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import law_checks
import torch
import torch.distributed as dist
from fsdp_worker import network
from ranks_worker import batch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from pruningawaretraining import Pruning, count_macs

EPOCHS = 5
RULE = {"criterion": "taylor", "regularizer": {"type": "growing_l2", "strength": 1e-3}, "start": 1, "end": 3}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor]) -> None:
    inputs, labels = data
    optimizer.zero_grad()
    functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()


def under_ddp(device: torch.device, data: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Channels are removed, and the wrapper is made anew."""
    model = network().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    rules = {"rules": [{**RULE, "target": {"macs": 0.5}}]}
    pruner = Pruning(model, rules, example_inputs=data[0][:1], optimizer=optimizer)
    wrapped: nn.Module = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    masked = 0
    for epoch in range(EPOCHS):
        for _ in range(2):
            step(wrapped, optimizer, data)
            masked += law_checks.check_masked_channels(pruner)
        pruner.prune(wrapped, epoch)
        wrapped = pruner.rewrap(wrapped)
    return {"phase": pruner.phase, "fraction": pruner.macs.fraction, "masked": masked, "kind": type(wrapped).__name__}


def under_fsdp(device: torch.device, data: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Channels are masked while the weights are sharded, and removed once they are gathered."""
    model = network().to(device)
    dense = count_macs(model, data[0][:1])
    rules = {"rules": [{**RULE, "target": {"macs": 0.5}}]}
    pruner = Pruning(model, rules, example_inputs=data[0][:1])
    mesh = init_device_mesh(device.type, (1,))
    for layer in (model[3], model[6], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(EPOCHS):
        for _ in range(2):
            step(model, optimizer, data)
        pruner.prune(model, epoch)
    kind = type(next(model.parameters())).__name__
    gathered = pruner.gathered(network().to(device))
    fraction = count_macs(gathered.model, data[0][:1]) / dense
    masked = sum(int((~keep).sum()) for keep in pruner.masks.values())
    return {"phase": gathered.phase, "fraction": fraction, "masked": masked, "kind": kind}


def main() -> None:
    what, device, file = sys.argv[1], torch.device(sys.argv[2]), Path(sys.argv[3])
    if device.type == "cuda":
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    inputs, labels = batch(0)
    found = {"ddp": under_ddp, "fsdp": under_fsdp}[what](device, (inputs.to(device), labels.to(device)))
    file.write_text(json.dumps({**found, "backend": dist.get_backend()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
