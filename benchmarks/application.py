"""Training time with ``application: mask`` and ``application: remove`` on the same schedule.

Masked channels are still computed until the target is met; removed ones are not. Both runs train the same model on the
same batches, and prune by random scores, so that the same channels go; CPU seconds of all training steps are reported
beside a dense run.

    python benchmarks/application.py [--steps 4]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torchvision
from common import markdown, save
from torch import nn
from torch.nn import functional

from pruningawaretraining import Pruning

EPOCHS, TARGET = 12, 0.5


def train(name: str, application: str | None, steps: int) -> dict[str, float]:
    """CPU seconds of the training steps, and the MACs kept at the end; ``application`` None trains the dense model."""
    torch.manual_seed(0)
    model: nn.Module = getattr(torchvision.models, name)(weights=None, num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    inputs, labels = torch.randn(32, 3, 64, 64), torch.randint(0, 10, (32,))
    schedule = {"end": EPOCHS - 1, "target": {"macs": TARGET}, "final_sparsity": 0.4}
    rule = {"criterion": "random", "scope": "local", **schedule}
    pruner = None
    if application is not None:
        config = {"rules": [{**rule, "application": application}]}
        pruner = Pruning(model, config, example_inputs=inputs[:1], optimizer=optimizer)
    spent = 0.0
    model.train()
    for epoch in range(EPOCHS):
        start = time.process_time()
        for _ in range(steps):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        spent += time.process_time() - start
        if pruner is not None:
            pruner.prune(model, epoch)
    return {"seconds": spent, "macs": 1.0 if pruner is None else pruner.macs.fraction}


def main() -> None:
    """Measure, print the table and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4, help="training steps an epoch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in ("resnet18", "mobilenet_v2"):
        runs = {how: train(name, how, arguments.steps) for how in (None, "mask", "remove")}
        for how, run in runs.items():
            rows.append(
                {
                    "model": name,
                    "application": how or "(dense)",
                    "training, CPU s": round(run["seconds"], 1),
                    "of dense": f"{run['seconds'] / runs[None]['seconds']:.0%}",
                    "MACs at the end": f"{run['macs']:.4f}",
                }
            )
    print(markdown(rows))
    note = f"{EPOCHS} epochs of {arguments.steps} steps, batch 32, 64 px; pruned in every epoch until half of the MACs."
    print("saved", save("application", rows, "Training time: masking against removing at every event", note))


if __name__ == "__main__":
    main()
