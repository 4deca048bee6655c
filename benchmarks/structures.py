"""Channels, heads or blocks alone, and all in one ranking: accuracy at equal measured latency.

    OMP_NUM_THREADS=1 python benchmarks/structures.py --task resnet18 --data FOLDER --keep 0.6
    OMP_NUM_THREADS=1 python benchmarks/structures.py --task vit_tiny --data FOLDER
    OMP_NUM_THREADS=1 python benchmarks/structures.py --task minilm --data FOLDER --weights FOLDER --train 2560

Networks, data and trainings are those of ``tasks.py``: scored by ``taylor``, pruned while they train to the latency of
onnxruntime with one thread, and trained on. Blocks alone have no latency target: as few of them go as meet it.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from common import markdown, save
from tasks import (
    COMPARISONS,
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
from torch.nn import functional

from pruningawaretraining import Pruning, count_macs, load_pruned
from pruningawaretraining.errors import PruningError
from pruningawaretraining.models.skipped_blocks import PassThrough
from pruningawaretraining.runtimes.timing import compare_latency

DENSE = "nothing, trained as long"
NAMES = {"channel": "channels", "head": "heads", "depth": "blocks"}
COMMAND = "python benchmarks/structures.py --task resnet18 --data FOLDER --keep 0.6"


def shallower(task: Task, gone: int, count: int) -> nn.Module:
    """A copy without that many blocks, chosen by one batch."""
    model = copy.deepcopy(task.dense).eval()
    rule = {"pattern": "depth", "criterion": "taylor", "target": {"sparsity": gone / count}}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=task.example)
    x, y = next(task.batches(0))
    pruner.calibrate_with([(x, y)], lambda outputs, labels: functional.cross_entropy(_logits(outputs), labels))
    pruner.prune(model, 0)
    return model


def _logits(outputs: Any) -> torch.Tensor:
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def fewest_blocks(task: Task, keep: float, repeats: int) -> tuple[float, int]:
    """The smallest fraction of blocks without which the latency is met, or all but one; and their number."""
    rule = {"pattern": "depth", "target": {"sparsity": 0.5}}
    masks = Pruning(copy.deepcopy(task.dense), {"rules": [rule]}, example_inputs=task.example).masks
    count = sum(map(len, masks.values()))
    for gone in range(1, count):
        models = {"dense": (task.dense, task.example), "less": (shallower(task, gone, count), task.example)}
        if compare_latency(models, "onnxruntime", repeats=repeats).ratios["less"] <= keep * 1.02:
            break
    return gone / count, gone


def ways(task: Task, options: argparse.Namespace) -> dict[str, tuple[Any, dict[str, list[float]]]]:
    """Pattern and target of each row."""
    target = {"latency": [options.keep]}
    found: dict[str, tuple[Any, dict[str, list[float]]]] = {}
    for one in task.structures:
        blocks = {"sparsity": [fewest_blocks(task, options.keep, options.repeats)[0]]} if one == "depth" else target
        found[f"{NAMES[one]} alone"] = (one, blocks)
    return found | {" and ".join(NAMES[one] for one in task.structures): (list(task.structures), target)}


def folder_of(options: argparse.Namespace, way: str) -> Path:
    """Where the model of a way lies."""
    folder: Path = options.work / options.task / way.replace(" ", "_")
    return folder


def measured(task: Task, names: Iterable[str], options: argparse.Namespace) -> dict[str, dict[str, str]]:
    """What is measured of the models that were saved."""
    models: dict[str, Any] = {DENSE: (task.dense, task.example)}
    for name in names:
        for file in folder_of(options, name).glob("*.safetensors"):
            models[name] = (load_pruned(copy.deepcopy(task.dense), file).eval(), task.example)
    timed, macs = Timed(models, "onnxruntime", options), count_macs(task.dense, task.example)
    return {
        name: {
            "measured latency": timed.ratio(name),
            "MACs": f"{count_macs(model, task.example) / macs:.3f}",
            "blocks gone": str(sum(isinstance(each, PassThrough) for each in model.modules())),
        }
        for name, (model, _) in models.items()
        if name != DENSE
    }


def rows_of(task: Task, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one network."""
    tune = int(options.tune * task.steps)
    accuracies: dict[str, str] = {}
    for name, (pattern, target) in ways(task, options).items():
        folder = folder_of(options, name)
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.safetensors"):
            old.unlink()
        try:
            ((_, one),) = run(task, pattern, target, 0, tune, folder)[0].items()
        except PruningError as error:
            accuracies[name] = ""
            print(name, error, flush=True)
            continue
        accuracies[name] = f"{one['accuracy']:.1%}"
        print(name, accuracies[name], flush=True)
    dense = copy.deepcopy(task.dense)
    fit(task, dense, None, stretches_of(task, 1, 0, tune)[1])
    rows = [{"network": options.task, "training": training_of(options), "pruned": DENSE}]
    rows[0] |= {"measured latency": "1", "MACs": "1", "blocks gone": "0", "accuracy": f"{task.score(dense):.1%}"}
    times = measured(task, [name for name, accuracy in accuracies.items() if accuracy], options)
    for name, accuracy in accuracies.items():
        row = {"network": options.task, "training": "", "pruned": name}
        rows.append({**row, **times.get(name, {"measured latency": "not reached"}), "accuracy": accuracy})
    return rows


def main() -> None:
    """Train, prune, measure; print the table and save it beside the rows of the other networks."""
    parser = parser_of(__doc__, work=Path("runs/structures"), tune=2.0)
    parser.add_argument("--keep", type=float, default=0.75, help="fraction of the latency")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[options.task](options)
    if options.measure:
        rows = rows_known("structures", options.task)
        times = measured(task, [one["pruned"] for one in rows if one["accuracy"]], options)
        rows = [{**one, **times.get(one["pruned"], {})} for one in rows]
    else:
        rows = rows_of(task, options)
    rows += rows_of_others("structures", options.task)
    print(markdown(rows))
    note = (
        "Latency as a fraction of the dense model's: onnxruntime, batch 1, one thread, in turns: the median of "
        f"{COMPARISONS} comparisons, the lowest and the highest. "
        "Training: examples; epochs before pruning, of pruning and after it. Blocks alone have no latency target: as "
        "few go as meet it. Tested on the 10,000 test images, or on the 872 labelled texts. One seed: differences of a "
        "point or two are to be expected by chance alone."
    )
    print("saved", save("structures", rows, "Channels, heads, blocks, and all in one ranking", note, COMMAND))


if __name__ == "__main__":
    main()
