"""A family of three from one run against a run for each alone: accuracy, promised and measured latency, and the cost.

    OMP_NUM_THREADS=1 python benchmarks/family.py --task resnet18 --data FOLDER
    OMP_NUM_THREADS=1 python benchmarks/family.py --task minilm --data FOLDER --weights FOLDER

``--data`` holds a ``load.py`` with ``cifar10(split)`` and ``text(name)``; ``--weights`` a pretrained BERT-like encoder
as transformers saves it. The dense model is trained first. Then one run prunes it to 0.7, 0.5 and 0.33 of its latency,
with an epoch of fine-tuning for the first two, and a run of as many events goes to each of them alone. Every run takes
its learning rate from a peak to a twentieth by a cosine, for each member anew.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from common import markdown, save
from tasks import (
    COMPARISONS,
    EVENTS,
    TASKS,
    Task,
    Timed,
    fit,
    parser_of,
    rows_known,
    rows_of_others,
    run,
    stretches_of,
    training_of,
)
from torch import nn

from pruningawaretraining import load_pruned

FRACTIONS = (0.7, 0.5, 0.33)
MEASURED = ("measured, onnxruntime", "measured, torch", "measured, ms")
COMMAND = "python benchmarks/family.py --task resnet18 --data FOLDER --dense 10"


def measured(task: Task, options: argparse.Namespace) -> dict[str, dict[str, str]]:
    """What is measured of the dense model and of each member that was saved."""
    models: dict[str, tuple[nn.Module, Any]] = {"dense": (task.dense, task.example)}
    for fraction in FRACTIONS:
        file = options.work / options.task / f"pruned-{fraction:.2f}.safetensors"
        models[f"{fraction:.2f}"] = (load_pruned(copy.deepcopy(task.dense), file).eval(), task.example)
    onnx, torch_ = (Timed(models, runtime, options) for runtime in ("onnxruntime", "torch"))
    found = {}
    for name in models:
        ratios = ("1", "1") if name == "dense" else (onnx.ratio(name), torch_.ratio(name))
        found[name] = dict(zip(MEASURED, (*ratios, onnx.milliseconds(name)), strict=True))
    return found


def rows_of(task: Task, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one network."""
    hold, tune, pattern = int(options.hold * task.steps), int(options.tune * task.steps), list(task.structures)
    folder = options.work / options.task
    (folder / "alone").mkdir(parents=True, exist_ok=True)
    family, seconds = run(task, pattern, {"latency": list(FRACTIONS)}, hold, tune, folder)
    print("family", family, seconds, flush=True)
    alone: dict[str, dict[str, Any]] = {}
    costs: dict[str, float] = {}
    for fraction in FRACTIONS[::-1]:
        found, costs[f"{fraction:.2f}"] = run(task, pattern, {"latency": [fraction]}, hold, tune, folder / "alone")
        alone |= found
        print("alone", found, costs, flush=True)
    dense = copy.deepcopy(task.dense)
    control = fit(task, dense, None, stretches_of(task, 1, hold, tune)[1])
    times = measured(task, options)
    rows = [
        {
            "network": options.task,
            "training": training_of(options),
            "member": "dense, trained as long",
            "accuracy": f"{task.score(dense):.1%}",
            "of a run alone": "",
            "CPU s": round(control),
            "CPU s alone": "",
            "promised": "",
            **times["dense"],
        }
    ]
    for name, one in family.items():
        rows.append(
            {
                "network": options.task,
                "training": "",
                "member": name,
                "accuracy": f"{one['accuracy']:.1%}",
                "of a run alone": f"{alone[name]['accuracy']:.1%}",
                "CPU s": round(seconds) if name == f"{FRACTIONS[-1]:.2f}" else "",
                "CPU s alone": round(costs[name]),
                "promised": name,
                **times[name],
            }
        )
    return rows


def main() -> None:
    """Train, prune, measure; print the table and save it beside the rows of the other networks."""
    parser = parser_of(__doc__, work=Path("runs/family"))
    parser.add_argument("--hold", type=float, default=1, help="epochs of fine-tuning for the first members")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[options.task](options)
    if options.measure:
        times = measured(task, options)
        rows = [{**one, **times[one["promised"] or "dense"]} for one in rows_known("family", options.task)]
    else:
        rows = rows_of(task, options)
    rows += rows_of_others("family", options.task)
    print(markdown(rows))
    note = (
        "Promised and measured: latency as a fraction of the dense model's, batch 1, one thread, in turns: the median "
        f"of {COMPARISONS} comparisons, the lowest and the highest. "
        "The promise is for onnxruntime. Training: examples; epochs before pruning, of pruning and after "
        f"it. A run alone has {EVENTS} events a quarter of an epoch apart, the family as many, and {options.hold:g} "
        "more epochs for each of the first two members. One seed. CPU seconds are those of training and pruning."
    )
    print("saved", save("family", rows, "A family of three from one run", note, COMMAND))


if __name__ == "__main__":
    main()
