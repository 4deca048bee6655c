"""Run by test_fsdp.py on several processes: trainings under fully_shard, and what they gather at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ranks_worker import EPOCHS, SCHEDULE, STEPS, batch, share, step
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pruningawaretraining import Pruning, save_pruned
from pruningawaretraining.distributed.collectives import world_size
from pruningawaretraining.errors import PruningError
from pruningawaretraining.session.sharded_checkpoint import load_sharded, read_pruner_state, save_sharded

SHARDS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
"""Whether this PyTorch can run fully_shard on the CPU."""
LASSO = {"type": "block_lasso", "strength": 1e-2}
UNSTRUCTURED = {"pattern": "unstructured", "target": {"sparsity": 0.6}}
CHANNEL = {"target": {"macs": 0.5}, "final_sparsity": 0.7, **SCHEDULE}
CASES: dict[str, dict[str, Any]] = {
    "channel": {"regularizer": {"type": "growing_l2", "strength": 1e-2}, **CHANNEL},
    "taylor": {"criterion": "taylor", **CHANNEL},
    "geometric": {"criterion": "geometric_median", **CHANNEL},
    "bn_scale": {"criterion": "bn_scale", "regularizer": {"type": "bn_scale", "strength": 1e-3}, **CHANNEL},
    "slice": {"pattern": "slice", "target": {"sparsity": 0.4}, **SCHEDULE},
    "2:4": {"pattern": "2:4", "target": {"sparsity": 0.5}, "exclude": ["0"], "criterion": "weight", **SCHEDULE},
    "4x1": {"pattern": "4x1", "target": {"sparsity": 0.5}, "regularizer": LASSO, **SCHEDULE},
    "snip_momentum": {**UNSTRUCTURED, "criterion": "snip_momentum", "unit": "step", "start": 2, "end": 6, "every": 2},
    "snip, largest": {**UNSTRUCTURED, "criterion": {"type": "snip", "reduction": "max"}, **SCHEDULE},
    "retrain_free": {"pattern": "slice", "target": {"sparsity": 0.4}, "criterion": "retrain_free", **SCHEDULE},
    "straight through": {
        **UNSTRUCTURED, "criterion": "l1", "dynamic": {"type": "straight_through", "refresh": 2}, **SCHEDULE,
    },
    "straight through 2:4": {
        "pattern": "2:4", "target": {"sparsity": 0.5}, "exclude": ["0"], "dynamic": "straight_through", **SCHEDULE,
    },
    "straight through, channels": {**CHANNEL, "dynamic": "straight_through"},
    "regrow": {**UNSTRUCTURED, "start": 0, "end": 3, "dynamic": "regrow"},
    "alternate": {"pattern": "slice", "target": {"sparsity": 0.4}, "start": 0, "end": 2, "dynamic": "alternate"},
    "soft": {**UNSTRUCTURED, "dynamic": {"type": "soft", "steps": 2}, **SCHEDULE},
    "rewind": {**UNSTRUCTURED, "dynamic": {"type": "rewind", "to": 1}, **SCHEDULE},
    "rewind, channels": {**CHANNEL, "dynamic": {"type": "rewind", "to": 2}},
    "wanda": {**UNSTRUCTURED, "criterion": "wanda", **SCHEDULE},
}  # fmt: skip


def network() -> nn.Module:
    """Widths that two processes cannot share equally."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 9, 3), nn.GroupNorm(3, 9), nn.ReLU(), nn.Conv2d(9, 12, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(48, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3),
    )  # fmt: skip


def shard(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (world_size(),))
    fully_shard(model[3], mesh=mesh)
    fully_shard(model[6], mesh=mesh)
    fully_shard(model, mesh=mesh)


def pruner_of(model: nn.Module, rule: dict[str, Any]) -> Pruning:
    return Pruning(model, {"rules": [rule]}, example_inputs=batch(0)[0][:1])


def train(rule: dict[str, Any], folder: Path | None = None, name: str = "", resumed: bool = False) -> dict[str, Any]:
    """A training; with a folder it is left in the middle, and gone on with by another call."""
    model = network()
    pruner = pruner_of(model, rule)
    if resumed and folder is not None:
        pruner.load_state_dict(read_pruner_state(folder / name))
    if world_size() > 1:
        shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if resumed and folder is not None:
        load_sharded(folder / name, model, optimizer, pruner)
    half = EPOCHS // 2
    for epoch in range(half if resumed else 0, half if folder and not resumed else EPOCHS):
        for number in range(STEPS):
            step(model, optimizer, epoch * STEPS + number)
        with torch.no_grad():
            model(share(99)[0])  # leaves the root whole
        pruner.prune(model, epoch)
    if folder and not resumed:
        save_sharded(folder / name, model, optimizer, pruner)
        return {}
    if world_size() > 1:
        pruner = pruner.gathered(network())
    return {"masks": pruner.masks, "model": pruner.model.state_dict(), "phase": pruner.phase}


def refusals() -> dict[str, str]:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    found = {}

    def tried(name: str, call: Any) -> None:
        try:
            call()
            found[name] = "nothing"
        except PruningError as error:
            found[name] = str(error)

    def after() -> None:
        model = network()
        shard(model)
        pruner_of(model, CASES["channel"])

    def parallel() -> None:
        model = network()
        pruner = pruner_of(model, CASES["channel"])
        parallelize_module(
            model, init_device_mesh("cpu", (world_size(),), mesh_dim_names=("tp",)), {"6": ColwiseParallel()}
        )
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        pruner.prune(model, 1)

    def every() -> None:
        model = network()
        pruner = pruner_of(model, {**CASES["channel"], "application": "remove"})
        shard(model)
        pruner.prune(model, 1)

    def family() -> None:
        model = network()
        pruner = pruner_of(model, {"end": 3, "target": {"macs": [0.8, 0.6]}})
        shard(model)
        pruner.prune(model, 1)

    def removal() -> None:
        model = network()
        pruner = pruner_of(model, CASES["channel"])
        shard(model)
        pruner.prune(model, 1)
        pruner.remove()

    def saved() -> None:
        model = network()
        shard(model)
        save_pruned(model, "never.safetensors")

    tried("saved", saved)
    for name, call in {
        "after": after,
        "parallel": parallel,
        "every": every,
        "family": family,
        "removal": removal,
    }.items():
        tried(name, call)
    return found


def train_all(folder: Path | None = None, resumed: bool = False) -> dict[str, Any]:
    """The trainings by name: whole, or the first or the second half of each."""
    return {name: train(rule, folder, name, resumed) for name, rule in CASES.items()}
