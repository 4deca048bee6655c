"""Write examples/quickstart.ipynb; `python scripts/make_notebook.py`. The notebook is edited here, not by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
CELLS: list[tuple[str, str]] = [
    (
        "markdown",
        """# Prune a network while it trains

A small residual network learns to read 8 x 8 handwritten digits, and half of its multiply-accumulates go on the way.
It takes about half a minute on a CPU: `pip install .` in the repository first.""",
    ),
    (
        "code",
        """import torch
from sklearn.datasets import load_digits
from torch import nn

from pruningawaretraining import Pruning, load_pruned, save_pruned
from pruningawaretraining.experiment.models import digits_resnet
from pruningawaretraining.report.notebook import Curves

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels))
train, test = order[:1297], order[1297:]""",
    ),
    (
        "markdown",
        """## The pruner

`start` and `end` are epochs, counted from 0. Until `start` the regulariser alone works; the target is met by `end`.""",
    ),
    (
        "code",
        """epochs = 12
model = digits_resnet()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
config = {
    "rules": [
        {
            "criterion": "magnitude",
            "regularizer": {"type": "growing_l2", "strength": 1e-3},
            "start": epochs // 4,
            "end": epochs - 2,
            "target": {"macs": 0.5},
            "multiple": 8,
        }
    ]
}
pruner = Pruning(model, config, example_inputs=images[:1], optimizer=optimizer)
pruner.best_begins_anew = True  # this loop keeps no best checkpoint: no warning at the removal
pruner.report()""",
    ),
    (
        "markdown",
        """## The loop

Two lines are new in it: `channel_regularize` and `prune`. The curves grow while it runs.""",
    ),
    (
        "code",
        """curves = Curves("Test accuracy and MACs kept by epoch")
shown = display(curves, display_id=True)

for epoch in range(epochs):
    model.train()
    for batch in train[torch.randperm(len(train))].split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        pruner.channel_regularize(model)
        optimizer.step()
    pruner.prune(model, epoch, log=print)

    model.eval()
    with torch.no_grad():
        accuracy = float((model(images[test]).argmax(1) == labels[test]).float().mean())
    curves.add(epoch, accuracy=accuracy, MACs=pruner.macs.fraction)
    shown.update(curves)""",
    ),
    ("markdown", "## What is left\n\nThe channels are gone: this is an ordinary, smaller network."),
    ("code", "pruner.report()"),
    (
        "code",
        """save_pruned(model, "pruned.safetensors")
again = load_pruned(digits_resnet(), "pruned.safetensors").eval()
with torch.no_grad():
    difference = float((again(images[test]) - model(images[test])).abs().max())
print(f"reloaded: largest difference {difference:.1e}")
print(f"accuracy {accuracy:.1%} with {pruner.macs.fraction:.3f} of the MACs")""",
    ),
]


def notebook() -> dict[str, Any]:
    """The notebook as plain data, in version 4.5 of its format."""
    cells: list[dict[str, Any]] = []
    for number, (kind, text) in enumerate(CELLS):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        cells.append(cell | {"source": text.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def text() -> str:
    """The file."""
    return json.dumps(notebook(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
