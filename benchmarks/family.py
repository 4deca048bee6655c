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
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from common import RESULTS, markdown, save
from latency_target import accuracy, cifar, train
from one_shot_cifar import load_module
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Pruning, load_pruned
from pruningawaretraining.runtimes.timing import compare_latency
from pruningawaretraining.session.members import Member

FRACTIONS = (0.7, 0.5, 0.33)
BATCH, EVENTS = 32, 4  # events of each member, a quarter of an epoch apart
COMMAND = "python benchmarks/family.py --task resnet18 --data FOLDER"


@dataclass(frozen=True)
class Task:
    """A trained dense model, and what trains and tests it.

    Args:
        dense: the model.
        rule: of the pruning, without times and target.
        example: inputs for latency.
        batches: epoch -> its batches, each (inputs, labels).
        loss: of (model, inputs, labels).
        score: accuracy of a model.
        steps: batches of an epoch.
        rate: the highest learning rate.
    """

    dense: nn.Module
    rule: dict[str, Any]
    example: Any
    batches: Callable[[int], Iterator[tuple[Any, Tensor]]]
    loss: Callable[[nn.Module, Any, Tensor], Tensor]
    score: Callable[[nn.Module], float]
    steps: int
    rate: float


def images_task(options: argparse.Namespace) -> Task:
    """torchvision's ResNet-18 on CIFAR-10, trained from scratch."""
    data = cifar(options.data, options.train, options.test)
    torch.manual_seed(0)
    dense = torchvision.models.resnet18(num_classes=10)
    train(dense, data["train"], options.dense, 0.05, 0)
    images, labels = data["train"]

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(epoch)
        for picked in torch.randperm(len(images), generator=generator).split(BATCH):
            x = functional.pad(images[picked], (3, 3, 3, 3))
            top, left = torch.randint(0, 7, (2,), generator=generator).tolist()
            x = x[:, :, top : top + 32, left : left + 32]
            yield (x.flip(3) if bool(torch.rand(1, generator=generator) < 0.5) else x), labels[picked]

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(model(x), y)

    rule = {"pattern": ["channel", "depth"], "criterion": "taylor"}
    example = torch.zeros(1, 3, 32, 32)
    steps = math.ceil(len(images) / BATCH)
    return Task(dense, rule, example, batches, loss, lambda model: accuracy(model, data["test"]), steps, 0.01)


def text_task(options: argparse.Namespace) -> Task:
    """A pretrained encoder with a new head, fine-tuned on SST-2."""
    from transformers import AutoTokenizer, BertForSequenceClassification

    loader = load_module(options.data)
    tokenizer = AutoTokenizer.from_pretrained(options.weights)
    torch.manual_seed(0)
    dense = BertForSequenceClassification.from_pretrained(options.weights, num_labels=2)

    def encoded(name: str, count: int | None) -> tuple[dict[str, Tensor], Tensor]:
        texts, labels = loader.text(name)
        found = tokenizer(
            texts[:count], padding="max_length", truncation=True, max_length=options.tokens, return_tensors="pt"
        )
        return {key: found[key] for key in ("input_ids", "attention_mask")}, torch.tensor(labels[:count])

    (inputs, labels), tests = encoded("sst2_train", options.train), encoded("sst2_dev", None)

    def picked(values: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        length = int(values["attention_mask"][rows].sum(1).max())
        return {key: value[rows, :length] for key, value in values.items()}

    def batches(epoch: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        generator = torch.Generator().manual_seed(epoch)
        for rows in torch.randperm(len(labels), generator=generator).split(BATCH):
            yield picked(inputs, rows), labels[rows]

    def loss(model: nn.Module, x: dict[str, Tensor], y: Tensor) -> Tensor:
        return functional.cross_entropy(model(**x).logits, y)

    @torch.no_grad()
    def score(model: nn.Module) -> float:
        model.eval()
        parts = torch.arange(len(tests[1])).split(64)
        return sum(
            int((model(**picked(tests[0], rows)).logits.argmax(1) == tests[1][rows]).sum()) for rows in parts
        ) / len(tests[1])

    rule = {"pattern": ["channel", "head", "depth"], "criterion": "taylor"}
    example = picked(inputs, torch.arange(1))
    task = Task(dense, rule, example, batches, loss, score, math.ceil(len(labels) / BATCH), 1e-4)
    fit(task, dense, None, [(0, options.dense * task.steps)])
    return task


TASKS = {"resnet18": images_task, "minilm": text_task}


def fit(task: Task, model: nn.Module, pruner: Pruning | None, stretches: list[tuple[int, int]]) -> float:
    """Train through the stretches, each with a learning rate that falls by a cosine; returns the CPU seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.rate, weight_decay=0.01)
    if pruner is not None:
        pruner.attach(optimizer)
    last, number, epoch, begun = stretches[-1][1], 0, 0, time.process_time()
    while number < last:
        model.train()
        for x, y in task.batches(epoch):
            start, end = next(one for one in stretches if one[0] <= number < one[1])
            part = (number - start) / (end - start)
            for group in optimizer.param_groups:
                group["lr"] = task.rate * (0.05 + 0.95 * (1 + math.cos(math.pi * part)) / 2)
            optimizer.zero_grad()
            task.loss(model, x, y).backward()
            optimizer.step()
            number += 1
            if number >= last:
                break
        if pruner is not None:
            pruner.prune(model, epoch)
        epoch += 1
    if pruner is not None:
        pruner.on_train_end()
    return time.process_time() - begun


def run(
    task: Task, fractions: tuple[float, ...], hold: int, tune: int, folder: Path
) -> tuple[dict[str, dict[str, Any]], float]:
    """One run to a family, or to one model: accuracy and file by the member's name, and the CPU seconds."""
    every = max(task.steps // 4, 1)
    events = EVENTS * len(FRACTIONS) // len(fractions)
    first, spans = 1, []
    for _ in fractions:
        end = first + (events - 1) * every
        spans.append((first, end))
        first = end + hold
    target = {"latency": list(fractions)}
    rule = {
        **task.rule,
        "unit": "step",
        "start": 1,
        "end": spans[-1][1],
        "every": every,
        "target": target,
        "hold": hold,
    }
    model = copy.deepcopy(task.dense)
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=task.example)
    found: dict[str, dict[str, Any]] = {}

    def finished(member: Member) -> None:
        path = member.save(folder)
        found[member.name] = {"file": path, "accuracy": task.score(model)}
        model.train()

    pruner.on_member = finished
    cuts = [0, *(start for start, _ in spans[1:]), spans[-1][1] + tune]
    seconds = fit(task, model, pruner, list(zip(cuts[:-1], cuts[1:], strict=True)))
    return found, seconds


def rows_of(task: Task, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one network."""
    hold, tune = int(options.hold * task.steps), int(options.tune * task.steps)
    folder = options.work / options.task
    (folder / "alone").mkdir(parents=True, exist_ok=True)
    family, seconds = run(task, FRACTIONS, hold, tune, folder)
    print("family", family, seconds, time.strftime("%X"), flush=True)
    alone: dict[str, dict[str, Any]] = {}
    costs: dict[str, float] = {}
    for fraction in FRACTIONS[::-1]:
        found, costs[f"{fraction:.2f}"] = run(task, (fraction,), hold, tune, folder / "alone")
        alone |= found
        print("alone", found, costs, time.strftime("%X"), flush=True)
    dense = copy.deepcopy(task.dense)
    control = fit(task, dense, None, [(0, 1 + (EVENTS * len(FRACTIONS) - 1) * max(task.steps // 4, 1) + tune)])
    models: dict[str, tuple[nn.Module, Any]] = {"dense": (task.dense, task.example)}
    for name, one in family.items():
        models[name] = (load_pruned(copy.deepcopy(task.dense), one["file"]).eval(), task.example)
    timed = {runtime: compare_latency(models, runtime, repeats=options.repeats) for runtime in ("onnxruntime", "torch")}
    rows = [
        {
            "network": options.task,
            "member": "dense, trained as long",
            "accuracy": f"{task.score(dense):.1%}",
            "of a run alone": "",
            "CPU s": round(control),
            "CPU s alone": "",
            "promised": "",
            "measured, onnxruntime": "1",
            "measured, torch": "1",
            "measured, ms": f"{timed['onnxruntime'].latencies['dense'].median_ms:.3g}",
        }
    ]
    for name, one in family.items():
        rows.append(
            {
                "network": options.task,
                "member": name,
                "accuracy": f"{one['accuracy']:.1%}",
                "of a run alone": f"{alone[name]['accuracy']:.1%}",
                "CPU s": round(seconds) if name == f"{FRACTIONS[-1]:.2f}" else "",
                "CPU s alone": round(costs[name]),
                "promised": name,
                "measured, onnxruntime": _share(timed["onnxruntime"], name),
                "measured, torch": _share(timed["torch"], name),
                "measured, ms": f"{timed['onnxruntime'].latencies[name].median_ms:.3g}",
            }
        )
    return rows


def _share(timed: Any, name: str) -> str:
    low, high = timed.intervals[name]
    return f"{timed.ratios[name]:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Train, prune, measure; print the table and save it beside the rows of the other networks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=list(TASKS), default="resnet18")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="of the encoder, for minilm")
    parser.add_argument("--work", type=Path, default=Path("runs/family"), help="where models are written")
    parser.add_argument("--train", type=int, default=6000, help="training examples")
    parser.add_argument("--test", type=int, default=5000, help="test images")
    parser.add_argument("--tokens", type=int, default=48, help="most tokens of a text")
    parser.add_argument("--dense", type=int, default=5, help="epochs before pruning")
    parser.add_argument("--hold", type=float, default=1, help="epochs of fine-tuning for the first members")
    parser.add_argument("--tune", type=float, default=4, help="epochs after the last event")
    parser.add_argument("--repeats", type=int, default=400, help="turns of the timing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = rows_of(TASKS[options.task](options), options)
    path = RESULTS / "family.json"
    known = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows += [one for one in known if one["network"] != options.task]
    print(markdown(rows))
    note = (
        "Promised and measured: latency as a fraction of the dense model's, batch 1, one thread, in turns; 95% "
        f"confidence. {options.train} training examples; a run alone has {EVENTS * len(FRACTIONS)} events a quarter of "
        f"an epoch apart and {options.tune:g} epochs after them, the family as many events, {options.hold:g} more "
        "epochs for each of the first two members, and the same after the last. One seed. CPU seconds are those of "
        "training and pruning."
    )
    print("saved", save("family", rows, "A family of three from one run", note, COMMAND))


if __name__ == "__main__":
    main()
