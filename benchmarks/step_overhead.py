"""What the regulariser and the masks add to a training step, beside Torch-Pruning's GroupNormPruner.regularize.

Both compute the same growing L2 penalty on the same coupled groups. Reported as fractions of forward + backward
(batch 32, 64 px) in CPU seconds on one thread, medians of interleaved rounds; the gradients of the two are compared
where Torch-Pruning's are right (it leaves depthwise weights and LayerNorm out). Ours are its compiled passes
(``pip install '.[fast]'``).

    python benchmarks/step_overhead.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import torch
import torch_pruning as tp
import torchvision
from common import add_penalties, interleaved, markdown, save
from torch import nn

from pruningawaretraining import Pruning
from pruningawaretraining.groups import kernels as fused

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "densenet121", "convnext_tiny")
REG = 1e-3
NOTE = (
    "Ours with numba (`pip install '.[fast]'`). n/a: Torch-Pruning leaves depthwise weights (mobilenet_v2) and "
    "LayerNorm (convnext_tiny) out of the norm."
)


def peer(model: nn.Module, inputs: torch.Tensor) -> Any:
    """Torch-Pruning's pruner with the same penalty; the classifier is left out, as ours finds by itself."""
    head = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1000]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = tp.pruner.GroupNormPruner(
            model,
            (inputs[:1],),
            importance=tp.importance.GroupMagnitudeImportance(),
            reg=REG,
            ignored_layers=head,
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
        )
    model.train()
    return made


def largest_difference(model: nn.Module, ours: Any, theirs: Any) -> float:
    """Largest difference between the two penalties' gradients."""
    gradients = []
    for add in (ours, theirs):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        add()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    return max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True))


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None)
    inputs = torch.randn(32, 3, 64, 64)
    rule = {"regularizer": {"type": "growing_l2", "strength": REG}, "target": {"sparsity": 0.6}, "end": 1}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=inputs[:1])
    theirs = peer(model, inputs)

    def forward_backward() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(inputs).sum().backward()

    forward_backward()
    engine = pruner.engine
    difference = largest_difference(model, lambda: add_penalties(engine), lambda: theirs.regularize(model))
    dense = interleaved(
        {"step": forward_backward, "ours": lambda: add_penalties(engine), "theirs": lambda: theirs.regularize(model)},
        rounds,
        clock=time.process_time,
    )
    pruner.prune(model, 0)  # 30% of the channels are masked from here on
    masked = interleaved(
        {
            "step": forward_backward,
            "regulariser": lambda: add_penalties(engine),
            "masks": pruner.channel_pruner.masks.apply,
        },
        rounds,
        clock=time.process_time,
    )
    both = masked["regulariser"] + masked["masks"]
    return {
        "model": name,
        "forward + backward, CPU ms": round(1e3 * dense["step"], 1),
        "ours, regulariser": f"{dense['ours'] / dense['step']:.1%}",
        "Torch-Pruning, regulariser": f"{dense['theirs'] / dense['step']:.1%}",
        "times faster": round(dense["theirs"] / dense["ours"], 1),
        "ours, masks at 30%": f"{masked['masks'] / masked['step']:.1%}",
        "ours, both": f"{both / masked['step']:.1%}",
        "largest gradient difference": f"{difference:.1e}" if name not in ("mobilenet_v2", "convnext_tiny") else "n/a",
    }


def main() -> None:
    """Measure every model, print the table and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not fused.available():
        parser.error("numba is not installed: pip install '.[fast]'")
    rows = [measure(name, arguments.rounds) for name in MODELS]
    print(markdown(rows))
    print("saved", save("step_overhead", rows, "Regulariser and masks in a training step", NOTE))


if __name__ == "__main__":
    main()
