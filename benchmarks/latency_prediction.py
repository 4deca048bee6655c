"""Predicted against measured latency of pruned models in onnxruntime: tables of layers, fitted on four copies.

Widths are drawn at random for every set of coupled layers, none of them among the copies of the fit: round ones (of 8)
as a latency target chooses them, and any. Measured in turns with the dense model, by the time that the one thread ran.

    python benchmarks/latency_prediction.py [--pairs 6]
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import timm
import torch
import torchvision
from common import markdown, save
from torch import Tensor, nn

from pruningawaretraining import Pruning
from pruningawaretraining.config import Target
from pruningawaretraining.masks.pruned_copy import pruned_copy
from pruningawaretraining.patterns.channel_groups import ChannelGroups

INPUT = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
MODELS = ("resnet18", "mobilenet_v2", "vit_tiny_patch16_224")


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("vit"):
        return timm.create_model(name).eval()
    return getattr(torchvision.models, name)().eval()


def drawn(found: ChannelGroups, generator: torch.Generator, block: int) -> Tensor:
    """Masks with a random width for each set: about so much of all sets, each varied around it."""
    keep_D = torch.ones(found.grouping.size, dtype=torch.bool)
    level = 0.3 + 0.6 * float(torch.rand(1, generator=generator))
    for one in found.grouping.sets:
        share = min(max(level + 0.4 * (float(torch.rand(1, generator=generator)) - 0.5), 0.1), 1.0)
        unit = block if one.size >= 2 * block else min(block, max(one.size // 4, 1))
        keep_D[one.start + min(max(round(one.size * share / unit), 1) * unit, one.size) : one.stop] = False
    return keep_D


def measured(name: str, pairs: int) -> list[dict[str, Any]]:
    """Rows of one model."""
    model = build(name)
    pruner = Pruning(model, {"rules": [{"target": {"macs": 0.99}}]}, example_inputs=INPUT)
    engine = pruner.channel_pruner
    latency = engine.targets.latency(Target(latency=0.5))
    generator = torch.Generator().manual_seed(1)
    rows = []
    for kind, block in (("multiples of 8", 8), ("any width", 1)):
        errors, shares = [], []
        for _ in range(pairs):
            keep_D = drawn(engine.found, generator, block)
            predicted = latency.cost(keep_D)
            copied = pruned_copy(model, engine.found, keep_D)
            found = latency.meter.milliseconds(
                {"dense": (latency._dense, latency.inputs), "copy": (copied, latency.inputs)}
            )
            truth = latency.dense_ms * found["copy"] / found["dense"]
            errors.append(predicted / truth - 1)
            shares.append(truth / latency.dense_ms)
            print(name, kind, f"{predicted:.3f} {truth:.3f} {errors[-1]:+.1%}", flush=True)
        rows.append(
            {
                "model": name,
                "widths": kind,
                "dense, ms": round(latency.dense_ms, 2),
                "pruned / dense": f"{min(shares):.2f} to {max(shares):.2f}",
                "copies": pairs,
                "mean error": f"{statistics.fmean(map(abs, errors)):.1%}",
                "largest error": f"{max(errors, key=abs):+.1%}",
                "within 10%": f"{sum(abs(one) <= 0.1 for one in errors)} of {pairs}",
            }
        )
    return rows


def main() -> None:
    """Measure every model, print the table and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=6, help="pruned copies for each model and kind of widths")
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in arguments.models for row in measured(name, arguments.pairs)]
    print(markdown(rows))
    note = "Predictions before any correction by a measurement of the copy itself; batch 1, 1 thread, 224 x 224."
    print("saved", save("latency_prediction", rows, "Predicted against measured latency, onnxruntime", note))


if __name__ == "__main__":
    main()
