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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from pruningawaretraining import Pruning

RESULTS = Path(__file__).parent / "results" / "scaling.json"
GROWING = {"regularizer": {"type": "growing_l2", "strength": 1e-3}}
RULES: dict[str, dict[str, Any]] = {
    "no pruner": {},
    "channels, magnitude, growing L2": {**GROWING, "target": {"macs": 0.5}, "final_sparsity": 0.6},
    "channels, taylor": {"criterion": "taylor", "target": {"macs": 0.5}, "final_sparsity": 0.6},
    "channels, variance": {"criterion": "variance", "target": {"macs": 0.5}, "final_sparsity": 0.6},
    "2:4, snip_momentum": {"pattern": "2:4", "criterion": "snip_momentum", "target": {"sparsity": 0.5}},
    "unstructured, weight": {"pattern": "unstructured", "criterion": "weight", "target": {"sparsity": 0.8}},
}
CALLS = (
    "all_reduce",
    "broadcast",
    "all_gather",
    "barrier",
    "gather",
    "reduce_scatter_tensor",
    "all_gather_into_tensor",
)
BATCH, STEPS = 8, 15


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
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model: nn.Module = resnet18(num_classes=10)
    return model


def run(rule: dict[str, Any]) -> dict[str, Any]:
    """Steps and one event under one rule, in this process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model, meter = network(), Meter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = None
    if rule:
        config = {"rules": [{**rule, "start": 0, "end": 3}]}
        pruner = Pruning(model, config, example_inputs=torch.randn(1, 3, 64, 64), optimizer=optimizer)
    wrapped = DistributedDataParallel(model)
    generator, seconds = torch.Generator().manual_seed(rank), []
    inputs, targets = torch.randn(BATCH, 3, 64, 64, generator=generator), torch.arange(BATCH) % 10
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
        "step": statistics.median(seconds[3:]),
        "collectives_in_steps": len(in_steps),
        "event": event,
        "collectives_in_event": len(calls),
        "bytes_in_event": sum(size for _, size in calls),
        "gradient_bytes": sum(parameter.numel() * 4 for parameter in model.parameters()),
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
        best = [{"rule": name, **min(found, key=lambda one: float(one["step"]))} for name, found in rows.items()]
        print("ROWS " + json.dumps(best), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker()
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
    cores = os.cpu_count()
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "cores": cores, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
