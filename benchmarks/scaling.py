"""What pruning adds to a data-parallel step: collectives, bytes and seconds at 1, 2 and 4 processes on one machine.

    python benchmarks/scaling.py [--processes 1 2 4]

Processes talk by gloo. Seconds are medians of steps of a residual network, with and without the pruner in turns; bytes
are what one process hands to collectives, gradients included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from common import markdown, save
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from pruningawaretraining import Pruning
from pruningawaretraining.experiment.models import digits_resnet

GROWING = {"regularizer": {"type": "growing_l2", "strength": 1e-3}}
RULES: dict[str, dict[str, Any]] = {
    "no pruner": {},
    "channels, magnitude, growing L2": {**GROWING, "target": {"macs": 0.5}, "final_sparsity": 0.6},
    "channels, taylor": {"criterion": "taylor", "target": {"macs": 0.5}, "final_sparsity": 0.6},
    "channels, variance": {"criterion": "variance", "target": {"macs": 0.5}, "final_sparsity": 0.6},
    "2:4, snip_momentum": {"pattern": "2:4", "criterion": "snip_momentum", "target": {"sparsity": 0.5}},
    "unstructured, weight": {"pattern": "unstructured", "criterion": "weight", "target": {"sparsity": 0.8}},
}
IN_FORWARD = ("no pruner", "channels, variance")  # what they cost is no part of the optimizer's step
CALLS = (
    "all_reduce",
    "broadcast",
    "all_gather",
    "barrier",
    "gather",
    "reduce_scatter_tensor",
    "all_gather_into_tensor",
)
BATCH, STEPS = 32, 25


class Meter:
    """Counts the collectives that go through ``torch.distributed``, and their bytes."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside the block the functions are counted; DDP's own reducer does not go through them."""
        real = {name: getattr(dist, name) for name in CALLS}

        def counted(name: str) -> Any:
            def call(first: Any, *args: Any, **kwargs: Any) -> Any:
                tensors = first if isinstance(first, list) else [first]
                self.calls.append((name, sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))))
                return real[name](first, *args, **kwargs)

            return call

        for name in CALLS:
            setattr(dist, name, counted(name))
        try:
            yield
        finally:
            for name, function in real.items():
                setattr(dist, name, function)


def network() -> nn.Module:
    torch.manual_seed(0)
    return digits_resnet()


def run(rule: dict[str, Any]) -> dict[str, Any]:
    """Steps and one event under one rule, in this process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model, meter = network(), Meter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = None
    if rule:
        config = {"rules": [{**rule, "start": 0, "end": 3}]}
        pruner = Pruning(model, config, example_inputs=torch.randn(1, 1, 8, 8), optimizer=optimizer)
    wrapped = DistributedDataParallel(model)
    generator, seconds = torch.Generator().manual_seed(rank), []
    inputs, targets = torch.randn(BATCH, 1, 8, 8, generator=generator), torch.arange(BATCH) % 10
    with meter.counting():
        for _ in range(STEPS):
            began = time.perf_counter()
            optimizer.zero_grad()
            functional.cross_entropy(wrapped(inputs), targets).backward()
            optimizer.step()
            seconds.append(time.perf_counter() - began)
        in_steps = list(meter.calls)
        began = time.perf_counter()
        if pruner is not None:
            pruner.prune(model, 0)
        event = time.perf_counter() - began
    calls = meter.calls[len(in_steps) :]
    return {
        "processes": world,
        "ms a step": round(1e3 * statistics.median(seconds[5:]), 2),
        "our collectives in all steps": len(in_steps),
        "ms an event": round(1e3 * event, 1),
        "our collectives in an event": len(calls),
        "bytes in an event": sum(size for _, size in calls),
        "bytes of gradients in a step": sum(parameter.numel() * 4 for parameter in model.parameters()),
    }


def worker() -> None:
    """Run by torchrun: every rule, twice in turns; the first process prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows: dict[str, list[dict[str, Any]]] = {}
    for _ in range(2):
        for name, rule in RULES.items():
            rows.setdefault(name, []).append(run(rule))
    if dist.get_rank() == 0:
        best = [{"rule": name, **min(found, key=lambda one: float(one["ms a step"]))} for name, found in rows.items()]
        print("ROWS " + json.dumps(best), flush=True)
    dist.destroy_process_group()


def grown(width: int, depth: int, rule: dict[str, Any]) -> dict[str, Any]:
    """One process: seconds of what a step adds, and of an event, for a stack of linear layers."""
    layers: list[nn.Module] = [nn.Linear(64, width), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 8))
    config = {"rules": [{**rule, "start": 0, "end": 3}]}
    pruner = Pruning(model, config, example_inputs=torch.randn(1, 64))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    pruner.on_round()
    pruner.on_gradients(1.0, None)
    began = time.process_time()
    pruner.prune(model, 0)
    event, times = time.process_time() - began, []
    for _ in range(5):
        began = time.process_time()
        pruner.on_round()
        pruner.on_gradients(1.0, None)
        pruner.on_stepped()
        times.append(time.process_time() - began)
    return {
        "rule": next(name for name, one in RULES.items() if one == rule),
        "million parameters": round(sum(one.numel() for one in model.parameters()) / 1e6, 2),
        "groups": sum(len(keep) for keep in pruner.masks.values()),
        "CPU ms a step": round(1e3 * statistics.median(times), 2),
        "CPU ms an event": round(1e3 * event, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--grow", action="store_true", help="cost against parameters and groups instead, one process")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker()
        return
    if args.grow:
        torch.set_num_threads(1)
        sizes = [(512, 4), (1024, 4), (2048, 4), (512, 16), (512, 64)]
        grow = [grown(*size, rule) for name, rule in RULES.items() if name not in IN_FORWARD for size in sizes]
        note = "Stacks of linear layers, one thread, CPU seconds. A step is what masks, regulariser and statistics add."
        save("scaling_growth", grow, "Cost against parameters and groups", note)
        print(markdown(grow))
        return
    rows = []
    for processes in args.processes:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *launcher, __file__, "--worker"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("ROWS"))[5:])
        rows += found
        for row in found:
            print(json.dumps(row), flush=True)
    save(
        "scaling",
        rows,
        "Data-parallel steps: what pruning adds",
        f"{digits_resnet().__class__.__name__} of the demo, batches of {BATCH} on each process, gloo, {os.cpu_count()} "
        "cores: more processes than cores share them, and other work ran on the machine, so only differences of one "
        "number of processes mean anything. The better of two runs; an event scores, decides and masks.",
    )


if __name__ == "__main__":
    main()
