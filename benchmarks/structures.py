"""Channels alone, blocks alone, and both in one ranking: accuracy at equal measured latency, on CIFAR-10.

    OMP_NUM_THREADS=1 python benchmarks/structures.py --data FOLDER [--train 4000] [--dense 3] [--tune 1] [--keep 0.6]

The network, the data and the trainings are those of ``latency_target.py``. Groups are scored by ``taylor`` over the
same steps of training, pruned at once to the latency of onnxruntime, one thread, and trained on. Blocks alone have no
latency target: as few of them go as meet it.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
import torchvision
from common import markdown, save
from latency_target import accuracy, cifar, measured, train, training_parser
from torch import nn
from torch.nn import functional

from pruningawaretraining import Pruning, count_macs
from pruningawaretraining.models.skipped_blocks import PassThrough

STEPS, BATCH, RATE = 32, 64, 1e-3
X = torch.zeros(1, 3, 32, 32)
COMMAND = "python benchmarks/structures.py --data FOLDER"


def pruned(dense: nn.Module, rule: dict[str, Any], data: tuple[torch.Tensor, torch.Tensor]) -> nn.Module:
    """A copy, pruned at once by what some steps of training say."""
    model = copy.deepcopy(dense)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    pruner = Pruning(model, {"rules": [{"criterion": "taylor", **rule}]}, example_inputs=X, optimizer=optimizer)
    for images, labels in list(zip(data[0].split(BATCH), data[1].split(BATCH), strict=True))[:STEPS]:
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    pruner.prune(model, 0)
    return model


def fewest_blocks(dense: nn.Module, keep: float, data: tuple[torch.Tensor, torch.Tensor]) -> nn.Module:
    """Without as few blocks as meet the latency, or without all but one."""
    rule = {"pattern": "depth", "target": {"sparsity": 0.5}}
    masks = Pruning(copy.deepcopy(dense), {"rules": [rule]}, example_inputs=X).masks
    count = sum(map(len, masks.values()))
    for gone in range(1, count):
        model = pruned(dense, {"pattern": "depth", "target": {"sparsity": gone / count}}, data)
        if measured({"dense": dense, "model": model}, 1)["model"] <= keep:
            break
    return model


def main() -> None:
    """Train, prune, measure; print the table and save it."""
    options = training_parser(__doc__, train=4000, dense=3, seeds=2).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = cifar(options.data, options.train, options.test)
    dense = torchvision.models.resnet18(num_classes=10)
    train(dense, data["train"], options.dense, 0.05, 0)
    print("dense", accuracy(dense, data["test"]), time.strftime("%X"), flush=True)
    target = {"latency": options.keep}
    models = {
        "dense": dense,
        "channels": pruned(dense, {"pattern": "channel", "target": target}, data["train"]),
        "blocks": fewest_blocks(dense, options.keep, data["train"]),
        "channels and blocks": pruned(dense, {"pattern": ["channel", "depth"], "target": target}, data["train"]),
    }
    shares, rows = measured(models, 1), []
    for name, model in models.items():
        before, tuned = accuracy(model, data["test"]), []
        for seed in range(options.seeds):
            again = copy.deepcopy(model)
            train(again, data["train"], options.tune, 0.02, 1 + seed)
            tuned.append(accuracy(again, data["test"]))
        rows.append(
            {
                "resnet18": name,
                "measured latency": f"{shares[name]:.3f}",
                "MACs": f"{count_macs(model, X) / count_macs(dense, X):.3f}",
                "blocks gone": sum(isinstance(one, PassThrough) for one in model.modules()),
                "before tuning": f"{before:.1%}",
                "accuracy": " ".join(f"{one:.1%}" for one in tuned),
            }
        )
        print(rows[-1], time.strftime("%X"), flush=True)
    print(markdown(rows))
    note = (
        f"Target: {options.keep} of the latency. {options.train} training images of 32 x 32, {options.dense} epochs "
        f"before pruning and {options.tune} after it; {options.test} test images; one dense training, {options.seeds} "
        "fine-tunings of each. The machine did other work meanwhile: latencies are measured in turns, and differences "
        "of a point or two in accuracy are to be expected by chance alone."
    )
    print("saved", save("structures", rows, "CIFAR-10: channels, blocks, and both in one ranking", note, COMMAND))


if __name__ == "__main__":
    main()
