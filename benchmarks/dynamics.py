"""Sparsity and accuracy over a run with every dynamic: the configs of configs/dynamics/ on scikit-learn's digits.

    python benchmarks/dynamics.py            # about three minutes on one core

Every run trains the same network from the same start on the same batches, with the rule of its config; the test images
are those of the shipped digits experiment. The picture of docs/dynamics.md is drawn from the numbers.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from common import save
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Pruning
from pruningawaretraining.experiment.models import digits_resnet
from pruningawaretraining.report.svg import LineChart, Series, line_chart, standalone

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "dynamics"
PICTURES = ROOT / "docs" / "images"
TESTED = 500
"""Images that nothing trains on."""


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images and labels to train on, and to test on."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
    images, labels = (images - images.mean()) / images.std(), torch.tensor(labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:TESTED], order[TESTED:]
    return (images[train], labels[train]), (images[test], labels[test])


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Fraction of the images whose label is the largest output."""
    model.eval()
    return float((model(images).argmax(1) == labels).float().mean())


def train(config: dict[str, Any], dense: bool = False) -> dict[str, Any]:
    """One run of an experiment's config; sparsity and test accuracy after every epoch.

    Args:
        config: of configs/dynamics/.
        dense: without its rule.
    """
    (images, labels), test = data()
    torch.manual_seed(0)
    model, epochs = digits_resnet(), config["epochs"]
    optimizer = torch.optim.SGD(model.parameters(), lr=config["optimizer"]["lr"], **config["optimizer"]["kwargs"])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    rules = [{**rule, "enabled": not dense} for rule in config["pruning"]["rules"]]
    pruner = Pruning(model, {"rules": rules}, example_inputs=images[:1], optimizer=optimizer)
    found: dict[str, Any] = {"accuracy": [], "sparsity": []}
    started = time.process_time()
    for epoch in range(epochs):
        pruner.prune(model, epoch)
        model.train()
        for batch in torch.randperm(len(images)).split(config["batch_size"]):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        scheduler.step()
        found["accuracy"].append(accuracy(model, *test))
        found["sparsity"].append(0.0 if dense else pruner.sparsity)
    pruner.on_train_end()
    return {**found, "seconds": round(time.process_time() - started, 1)}


def picture(name: str, found: dict[str, Any], frozen: dict[str, Any]) -> None:
    """Sparsity and accuracy by epoch, beside the accuracy of frozen masks."""

    def line(label: str, values: list[float], style: str) -> Series:
        return Series(label, [(float(epoch), value) for epoch, value in enumerate(values)], style)

    series = [
        line("sparsity", found["sparsity"], "s-dense"),
        line("accuracy, frozen", frozen["accuracy"], "s-other"),
        line(f"accuracy, {name}", found["accuracy"], "s-kept"),
    ]
    title = f"{name}: sparsity (grey) and test accuracy by epoch"
    chart = LineChart(title, series, y_format=lambda value: f"{100 * value:.0f}%", y_range=(0.0, 1.02))
    (PICTURES / f"dynamic-{name}.svg").write_text(standalone(line_chart(chart)), encoding="utf-8")


def main() -> None:
    """Train every config and the controls, draw, and save."""
    configs = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(CONFIGS.glob("*.yaml"))}
    plain = json.loads(json.dumps(configs["straight_through"]))
    plain["pruning"]["rules"][0]["dynamic"] = "frozen"
    runs = {"dense": train(plain, dense=True), "frozen": train(plain)}
    runs |= {name: train(config) for name, config in configs.items()}
    for name, found in runs.items():
        picture(name, found, runs["frozen"])
    (PICTURES / "dynamic-dense.svg").unlink()
    rows = [
        {
            "dynamic": name,
            "sparsity": round(found["sparsity"][-1], 3),
            "accuracy, last epoch": f"{100 * found['accuracy'][-1]:.1f}%",
            "lowest after epoch 2": f"{100 * min(found['accuracy'][2:]):.1f}%",
            "CPU seconds": found["seconds"],
        }
        for name, found in runs.items()
    ]
    note = (
        "DigitsResNet on scikit-learn's digits, 16 epochs, 500 test images, one seed: differences of one or two images "
        "mean nothing. It shows that each dynamic does what it says, not which one to take."
    )
    save("dynamics", rows, "Dynamics on digits", note)


if __name__ == "__main__":
    main()
