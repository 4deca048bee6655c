"""Run by test_collectives.py on two processes: how many collectives a step and an event take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from fsdp_worker import SHARDS_ON_CPU, network, shard
from ranks_worker import batch, step
from torch.nn.parallel import DistributedDataParallel

from pruningawaretraining import Pruning
from pruningawaretraining.registry import names

PATTERNS = {"channel": {"target": {"macs": 0.6}}, "unstructured": {"target": {"sparsity": 0.5}}}


def counted(meter: Any, rule: dict[str, Any], sharded: bool = False) -> list[int]:
    """Collectives of ours in three steps, and in the event after them."""
    model = network()
    pruner = Pruning(model, {"rules": [{**rule, "start": 0, "end": 3}]}, example_inputs=batch(0)[0][:1])
    if sharded:
        shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    wrapped = model if sharded else DistributedDataParallel(model)
    step(wrapped, optimizer, 0)
    with meter.counting():
        before = len(meter.calls)
        for number in range(3):
            step(wrapped, optimizer, number)
        steps = [name for name, _ in meter.calls[before:] if name == "all_reduce" or not sharded]
        done = len(meter.calls)
        pruner.prune(model, 0)
        return [len(steps), len(meter.calls) - done]


def count() -> dict[str, Any]:
    """The counts of every criterion and pattern, and of sharded weights."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # in a process of its own
    from scaling import Meter

    found: dict[str, Any] = {}
    for criterion in names("criterion"):
        for pattern, rule in PATTERNS.items():
            of_channels = criterion in ("mac_aware", "reconstruction") and pattern != "channel"
            if criterion in ("block_change", "reap") or of_channels:
                continue
            regularizer = {"regularizer": "growing_l2"} if pattern == "channel" else {}
            rule = {"pattern": pattern, "criterion": criterion, **regularizer, **rule}
            found[f"{criterion} {pattern}"] = counted(Meter(), rule)
    for part in ({}, {"regularizer": "growing_l2"}, {"criterion": "taylor"}) if SHARDS_ON_CPU else ():
        name = next(iter(part.values()), "magnitude")
        found[f"sharded {name}"] = counted(Meter(), {**PATTERNS["channel"], **part}, sharded=True)
    return found
