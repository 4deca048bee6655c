"""Time and error to reach half of the MACs, beside Torch-Pruning's own loop of small pruning steps.

Ours scores once, bisects a global threshold on the analytic MAC model, gives back what fits, and removes once. The
graph is built before the clock starts, for both.

    python benchmarks/mac_target.py [--steps 400]
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import torch
import torch_pruning as tp
import torchvision
from common import markdown, save
from torch import nn

from pruningawaretraining import Pruning, count_macs

MODELS = ("resnet50", "mobilenet_v2")
TARGET = 0.5


def ours(name: str, inputs: torch.Tensor) -> dict[str, Any]:
    """One removal with our library."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None)
    built = time.perf_counter()
    pruner = Pruning(model, {"rules": [{"target": {"macs": TARGET}}]}, example_inputs=inputs)
    start, start_cpu = time.perf_counter(), time.process_time()
    pruner.prune(model, 0)
    wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    torch.manual_seed(0)
    dense = count_macs(getattr(torchvision.models, name)(weights=None), inputs)
    reached = count_macs(model, inputs) / dense
    return row(name, "pruningawaretraining", start - built, wall, cpu, reached, 1)


def theirs(name: str, inputs: torch.Tensor, steps: int) -> dict[str, Any]:
    """Torch-Pruning: small global steps until the target is met."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None)
    head = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1000]
    dense = count_macs(model, inputs)
    built = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.GroupNormPruner(
            model,
            (inputs,),
            importance=tp.importance.GroupMagnitudeImportance(),
            global_pruning=True,
            pruning_ratio=1.0,
            iterative_steps=steps,
            ignored_layers=head,
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
        )
    start, start_cpu = time.perf_counter(), time.process_time()
    done = 0
    while count_macs(model, inputs) > TARGET * dense and done < steps:
        pruner.step()
        done += 1
    wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    return row(name, "Torch-Pruning", start - built, wall, cpu, count_macs(model, inputs) / dense, done)


def row(name: str, who: str, build: float, wall: float, cpu: float, reached: float, removals: int) -> dict[str, Any]:
    """One row of the table."""
    return {
        "model": name,
        "library": who,
        "graph, s": round(build, 2),
        "prune, s": round(wall, 2),
        "prune, CPU s": round(cpu, 2),
        "MACs reached": f"{reached:.5f}",
        "below the target": f"{TARGET - reached:+.3%}",
        "removals": removals,
    }


def main() -> None:
    """Measure every model, print the table and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="Torch-Pruning's iterative steps towards 100%%")
    arguments = parser.parse_args()
    inputs = torch.randn(1, 3, 64, 64)
    rows = []
    for name in MODELS:
        rows += [ours(name, inputs), theirs(name, inputs, arguments.steps)]
    print(markdown(rows))
    print("saved", save("mac_target", rows, f"Reaching {TARGET} of the dense MACs"))


if __name__ == "__main__":
    main()
