"""Pruned by latency, by MACs, or uniformly: accuracy at equal measured latency, and speed at equal MACs, on CIFAR-10.

    OMP_NUM_THREADS=1 python benchmarks/latency_target.py --data FOLDER [--train 6000] [--dense 5] [--tune 1]

FOLDER holds a ``load.py`` with ``cifar10(split) -> (images, labels, names)``. torchvision's networks (their first
strides are kept: the images are 32 x 32) are trained from scratch for a few epochs on a part of the training images,
pruned at once by what channels' readers lose after a least-squares fit, fitted so, and trained on; what differs is only
which channels go. Latency is that of onnxruntime, one thread, measured in turns with the dense model.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from common import RESULTS, markdown, save
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Pruning, count_macs
from pruningawaretraining.costs.latency.meter import RuntimeMeter

MODELS = ("resnet18", "mobilenet_v2")
ALLOCATIONS = ("latency", "macs", "uniform")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
COMMAND = "python benchmarks/latency_target.py --data FOLDER"


def cifar(folder: Path, train: int, test: int) -> dict[str, tuple[Tensor, Tensor]]:
    """A part of the training and of the test images, normalised."""
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {}
    for split, count in (("train", train), ("test", test)):
        images, labels, _ = module.cifar10(split)
        pixels = torch.from_numpy(images[:count]).permute(0, 3, 1, 2).float() / 255
        pixels = (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
        found[split] = (pixels.contiguous(), torch.from_numpy(labels[:count]))
    return found


def train(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, lr: float, seed: int) -> None:
    """SGD on a cosine, with mirrored and shifted images."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    batch = 64
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * (len(images) // batch))
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for picked in order[: len(order) // batch * batch].split(batch):
            x = functional.pad(images[picked], (3, 3, 3, 3))
            top, left = torch.randint(0, 7, (2,), generator=generator).tolist()
            x = x[:, :, top : top + 32, left : left + 32]
            x = x.flip(3) if bool(torch.rand(1, generator=generator) < 0.5) else x
            optimizer.zero_grad()
            functional.cross_entropy(model(x), labels[picked], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Fraction of images that are right."""
    model.eval()
    right = sum(
        int((model(x).argmax(1) == y).sum()) for x, y in zip(data[0].split(500), data[1].split(500), strict=True)
    )
    return right / len(data[1])


def pruned(
    dense: nn.Module, target: dict[str, Any], allocation: str, cap: float, batch: int, data: tuple[Tensor, Tensor]
) -> nn.Module:
    """A copy, pruned at once."""
    model = copy.deepcopy(dense)
    rule = {
        "criterion": "reconstruction",
        "compensation": "least_squares",
        "target": target,
        "allocation": allocation,
        "max_sparsity": cap,
    }
    if "latency" not in target:  # a bound that always holds, for the batch that the milliseconds are about
        rule["target"] = {**target, "latency_ms": 1e6}
    rule["target"]["batch"] = batch
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=torch.zeros(1, 3, 32, 32))
    shown = list(zip(data[0][:2048].split(128), data[1][:2048].split(128), strict=True))
    pruner.calibrate_with(shown, functional.cross_entropy)
    pruner.prune(model, 0)
    for one in pruner.engine.rules[0].state.latencies:
        print("  ", one, flush=True)
    return model


def measured(models: dict[str, nn.Module], batch: int) -> dict[str, float]:
    """Latency of each as a fraction of the first's, in turns."""
    x = torch.zeros(batch, 3, 32, 32)
    found = RuntimeMeter("onnxruntime", batch).milliseconds({name: (model, x) for name, model in models.items()})
    first = next(iter(found.values()))
    return {name: ms / first for name, ms in found.items()} | {"ms": first}


def rows_of(name: str, data: dict[str, tuple[Tensor, Tensor]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one network."""
    torch.manual_seed(0)
    dense = getattr(torchvision.models, name)(num_classes=10)
    train(dense, data["train"], options.dense, 0.05, 0)
    print(name, "dense", accuracy(dense, data["test"]), time.strftime("%X"), flush=True)
    x = torch.zeros(1, 3, 32, 32)
    macs, count = count_macs(dense, x), sum(one.numel() for one in dense.parameters())
    rows = []
    for goal in ("latency", "macs"):
        models = {"dense": dense}
        for allocation in ALLOCATIONS:
            models[allocation] = pruned(
                dense, {goal: options.keep}, allocation, options.cap, options.batch, data["train"]
            )
        shares = measured(models, options.batch)
        for allocation in ALLOCATIONS:
            model = models[allocation]
            before = accuracy(model, data["test"])
            tuned = []
            for seed in range(options.seeds):
                again = copy.deepcopy(model)
                train(again, data["train"], options.tune, 0.02, 1 + seed)
                tuned.append(accuracy(again, data["test"]))
            rows.append(
                {
                    "model": name,
                    "equal": "latency" if goal == "latency" else "MACs",
                    "chosen by": {"latency": "latency", "macs": "MACs", "uniform": "uniformly"}[allocation],
                    "measured latency": f"{shares[allocation]:.3f}",
                    "speed-up": f"{1 / shares[allocation]:.2f}x",
                    "MACs": f"{count_macs(model, x) / macs:.3f}",
                    "parameters": f"{sum(one.numel() for one in model.parameters()) / count:.3f}",
                    "before tuning": f"{before:.1%}",
                    "accuracy": " ".join(f"{one:.1%}" for one in tuned),
                    "trained on": f"{options.train} images, {options.dense}+{options.tune} epochs",
                    "batch": options.batch,
                }
            )
            print(rows[-1], time.strftime("%X"), flush=True)
    base = copy.deepcopy(dense)
    train(base, data["train"], options.tune, 0.02, 1)
    line = {"model": name, "equal": "dense, trained as long", "measured latency": "1.000", "speed-up": "1.00x"}
    return [{**line, "MACs": "1.000", "parameters": "1.000", "accuracy": f"{accuracy(base, data['test']):.1%}"}, *rows]


def known() -> list[dict[str, Any]]:
    """Rows of an earlier run."""
    path = RESULTS / "latency_target.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def training_parser(description: str, **defaults: int) -> argparse.ArgumentParser:
    """Options of a benchmark that trains on CIFAR-10, prunes and fine-tunes."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", type=int, help="training images")
    parser.add_argument("--test", type=int, default=2000, help="test images")
    parser.add_argument("--dense", type=int, help="epochs before pruning")
    parser.add_argument("--tune", type=int, default=1, help="epochs after it")
    parser.add_argument("--seeds", type=int, help="fine-tunings of each pruned model")
    parser.add_argument("--keep", type=float, default=0.6, help="fraction of the latency (or of another cost) to keep")
    parser.set_defaults(**defaults)
    return parser


def main() -> None:
    """Train, prune, measure; print the table and save it."""
    parser = training_parser(__doc__, train=6000, dense=5, seeds=1)
    parser.add_argument("--cap", type=float, default=0.9, help="largest sparsity of a set")
    parser.add_argument("--batch", type=int, default=1, help="images in a batch for latency")
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = cifar(options.data, options.train, options.test)
    rows = []
    for name in options.models:
        rows += rows_of(name, data, options)
    rows += [one for one in known() if one["model"] not in options.models]
    print(markdown(rows))
    note = (
        f"Images of 32 x 32; {options.test} test images; at most {options.cap} of a set goes. Channels are scored by "
        "`reconstruction` and readers fitted by least squares, for all alike, on 2,048 training images. Accuracies are "
        "those of each fine-tuning: one dense training, short runs, so differences of a point or two are to be "
        "expected by chance alone. Epochs are those before and after pruning."
    )
    title = "CIFAR-10: pruned by latency, by MACs, uniformly"
    print("saved", save("latency_target", rows, title, note, COMMAND))


if __name__ == "__main__":
    main()
