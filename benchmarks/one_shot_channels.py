"""Channels of pretrained CIFAR-10 ResNets removed at once, readers fitted by least squares, nothing trained after it.

What scores channels, and how they are shared out among layers: magnitude ranked over all layers or alike in each, and
`reconstruction` per MAC.

    OMP_NUM_THREADS=1 python benchmarks/one_shot_channels.py --data FOLDER [--depths 20 56]

FOLDER (or $CIFAR_DATA, or ``data``) holds a ``load.py`` with ``cifar10(split)`` and ``cifar_resnet_state(depth)``.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cifar_training import BUDGETS, Data, evaluate, normalised
from common import markdown, save
from one_shot_cifar import Batches, load_module
from torch.nn import functional

from pruningawaretraining import count_macs
from pruningawaretraining.criteria.second_order.channels import recalibrate_norms
from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.experiment.models import CifarResNet
from pruningawaretraining.session.one_shot import AfterPruning, one_shot

LARGEST = {"type": "magnitude", "normalize": "max"}
WAYS: dict[str, dict[str, Any]] = {
    "magnitude, ranked": {"criterion": LARGEST},
    "magnitude, layers alike": {"criterion": LARGEST, "allocation": "uniform"},
    "variance, per MAC": {"criterion": "variance_next", "allocation": "macs"},
    "reconstruction, per MAC": {"criterion": "reconstruction"},
}
TARGETS = (2.11, 3.0)
AFTER = AfterPruning(compensation="least_squares", norm_batches=16, input_batches=16)
NOTE = (
    "Top-1 in percent on test images 2,000 to 6,000, right after the removal: no training. Widths inside blocks only "
    "(option-A shortcuts fix the others); at most 0.9 of a layer goes. Readers are fitted by least squares, and norms "
    "measured anew, on 1,024 augmented training images, for all alike."
)


def main() -> None:
    """Measure, print the table and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("CIFAR_DATA", "data")))
    parser.add_argument("--depths", type=int, nargs="*", default=[20, 56])
    options = parser.parse_args()
    if not (options.data / "load.py").is_file():
        print("skipped: this benchmark needs --data FOLDER", file=sys.stderr)
        return
    loader = load_module(options.data)
    data = Data.load(loader, replace(BUDGETS["small"], test=(2_000, 6_000)), torch.device("cpu"))
    plain = Batches(normalised(data.images_BCHW[:1024]), data.labels_B[:1024], 64)
    rows: list[dict[str, Any]] = []
    for depth in options.depths:
        model = CifarResNet(depth)
        model.load_state_dict(loader.cifar_resnet_state(depth))
        dense, macs = evaluate(model.eval(), data), count_macs(model, data.example)
        for name, batches in (("plain", plain), ("augmented", data.calibration)):
            shown = copy.deepcopy(model)
            recalibrate_norms(shown, Calibration(shown, batches, functional.cross_entropy), 16)
            label = f"(none removed, norms measured on {name} images)"
            rows.append({"network": f"ResNet-{depth}", "criterion": label, "dense": round(evaluate(shown, data), 2)})
        for name, way in WAYS.items():
            row: dict[str, Any] = {"network": f"ResNet-{depth}", "criterion": name, "dense": round(dense, 2)}
            start = time.process_time()
            for target in TARGETS:
                rule = {**way, "target": {"macs": 1 / target}, "max_sparsity": 0.9}
                (pruned,) = one_shot(model, rule, data.calibration, functional.cross_entropy, after=AFTER).values()
                assert count_macs(pruned, data.example) * target <= macs
                row[f"{target}x fewer MACs"] = round(evaluate(pruned, data), 2)
            row["CPU s, with the tests"] = round((time.process_time() - start) / len(TARGETS))
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    rows.sort(key=lambda row: f"{TARGETS[0]}x fewer MACs" not in row)  # the full rows first
    print(markdown(rows))
    title = "Channels of pretrained CIFAR-10 ResNets at once"
    print("saved", save("one_shot_channels", rows, title, NOTE, "python benchmarks/one_shot_channels.py --data FOLDER"))


if __name__ == "__main__":
    main()
