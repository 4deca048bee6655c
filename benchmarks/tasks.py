"""Networks, data and trainings of ``family.py`` and ``structures.py``: each prunes in a training of the same form.

A task is a trained dense network with what trains and tests it. :func:`run` prunes it to one target, or to a family of
them: events a quarter of an epoch apart, learning rates that fall by a cosine, for each member anew.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from common import RESULTS
from latency_target import accuracy, cifar, train
from one_shot_cifar import load_module
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Pruning
from pruningawaretraining.runtimes.timing import compare_latency
from pruningawaretraining.session.members import Member

BATCH, EVENTS = 32, 12  # of a batch; events of a run, a quarter of an epoch apart
COMPARISONS = 5  # of latencies


@dataclass(frozen=True)
class Task:
    """A trained dense model, and what trains and tests it.

    Args:
        dense: the model.
        structures: what its blocks can lose, of channel, head and depth.
        example: inputs for latency.
        batches: epoch -> its batches, each (inputs, labels).
        loss: of (model, inputs, labels).
        score: accuracy of a model.
        steps: batches of an epoch.
        rate: the highest learning rate.
        autocast: whether it trains in bfloat16.
    """

    dense: nn.Module
    structures: tuple[str, ...]
    example: Any
    batches: Callable[[int], Iterator[tuple[Any, Tensor]]]
    loss: Callable[[nn.Module, Any, Tensor], Tensor]
    score: Callable[[nn.Module], float]
    steps: int
    rate: float
    autocast: bool = False


def _images(options: argparse.Namespace, dense: nn.Module, **rest: Any) -> tuple[Task, dict[str, Any]]:
    data = cifar(options.data, options.train, options.test)
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

    task = Task(
        dense,
        example=torch.zeros(1, 3, 32, 32),
        batches=batches,
        loss=loss,
        score=lambda model: accuracy(model, data["test"]),
        steps=math.ceil(len(images) / BATCH),
        **rest,
    )
    return task, data


def resnet18(options: argparse.Namespace) -> Task:
    """torchvision's ResNet-18 on CIFAR-10, trained from scratch."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    task, data = _images(options, model, structures=("channel", "depth"), rate=1e-3)
    train(model, data["train"], options.dense, 0.05, 0)
    return task


def vit_tiny(options: argparse.Namespace) -> Task:
    """timm's ViT-tiny with patches of 8 x 8 on CIFAR-10, trained from scratch."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=10)
    task, _ = _images(options, model, structures=("channel", "head", "depth"), rate=3e-4, autocast=True)
    fit(task, model, None, [(0, options.dense * task.steps)])
    return task


def minilm(options: argparse.Namespace) -> Task:
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

    steps, structures = math.ceil(len(labels) / BATCH), ("channel", "head", "depth")
    task = Task(dense, structures, picked(inputs, torch.arange(1)), batches, loss, score, steps, 1e-4, autocast=True)
    fit(task, dense, None, [(0, options.dense * task.steps)])
    return task


TASKS = {"resnet18": resnet18, "vit_tiny": vit_tiny, "minilm": minilm}


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
            with torch.autocast("cpu", torch.bfloat16, enabled=task.autocast):
                loss = task.loss(model, x, y)
            loss.backward()
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


def stretches_of(task: Task, members: int, hold: int, tune: int) -> tuple[int, list[tuple[int, int]]]:
    """The step of the last event, and the stretches of a training to that many members."""
    every = max(task.steps // 4, 1)
    span = (EVENTS // members - 1) * every
    starts = [1 + number * (span + hold) for number in range(members)]
    last = starts[-1] + span
    cuts = [0, *starts[1:], last + tune]
    return last, list(zip(cuts[:-1], cuts[1:], strict=True))


def run(
    task: Task, pattern: Any, target: Mapping[str, list[float]], hold: int, tune: int, folder: Path
) -> tuple[dict[str, dict[str, Any]], float]:
    """One run to a family, or to one model: accuracy and file by the member's name, and the CPU seconds.

    Args:
        task: what is pruned.
        pattern: of the rule.
        target: one cost, and a fraction for each member.
        hold: steps of fine-tuning for each member but the last.
        tune: steps after the last event.
        folder: where the files go.
    """
    last, stretches = stretches_of(task, len(next(iter(target.values()))), hold, tune)
    rule = {
        "pattern": pattern,
        "criterion": "taylor",
        "unit": "step",
        "start": 1,
        "end": last,
        "every": max(task.steps // 4, 1),
        "target": dict(target),
        "hold": hold,
    }
    model = copy.deepcopy(task.dense)
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=task.example)
    found: dict[str, dict[str, Any]] = {}

    def finished(member: Member) -> None:
        path = member.save(folder)
        found[member.name] = {"file": path, "accuracy": task.score(model)}
        model.train()

    pruner.on_member, pruner.best_begins_anew = finished, True
    return found, fit(task, model, pruner, stretches)


def rows_of_others(name: str, network: str) -> list[dict[str, Any]]:
    """The rows of a saved result that are of other networks."""
    return [one for one in _rows(name) if one.get("network", network) != network]


def rows_known(name: str, network: str) -> list[dict[str, Any]]:
    """The rows of a saved result that are of this network."""
    return [one for one in _rows(name) if one.get("network") == network]


def _rows(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return rows


class Timed:
    """Comparisons of models, each in turns: what else runs on the hardware changes from one comparison to the next.

    Args:
        models: name -> model and inputs, the dense one first.
        runtime: where they run.
        options: of the command line.
    """

    def __init__(self, models: dict[str, Any], runtime: str, options: argparse.Namespace) -> None:
        turns = max(options.repeats // COMPARISONS, 1)
        self.found = [compare_latency(models, runtime, repeats=turns) for _ in range(COMPARISONS)]

    def ratio(self, name: str) -> str:
        """The median of the ratios, the lowest and the highest."""
        ratios = sorted(one.ratios[name] for one in self.found)
        return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"

    def milliseconds(self, name: str) -> str:
        """The median of the medians."""
        return f"{statistics.median(one.latencies[name].median_ms for one in self.found):.3g}"


def training_of(options: argparse.Namespace) -> str:
    """What a row says of the training."""
    return f"{options.train} examples, {options.dense}+{EVENTS / 4:g}+{options.tune:g} epochs"


def parser_of(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """Options of a benchmark of tasks."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--task", choices=list(TASKS), default="resnet18")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="of the encoder, for minilm")
    parser.add_argument("--work", type=Path, help="where models are written")
    parser.add_argument("--train", type=int, default=6000, help="training examples")
    parser.add_argument("--test", type=int, default=10000, help="test images")
    parser.add_argument("--tokens", type=int, default=48, help="most tokens of a text")
    parser.add_argument("--dense", type=int, default=5, help="epochs before pruning")
    parser.add_argument("--tune", type=float, default=4, help="epochs after the last event")
    parser.add_argument("--repeats", type=int, default=500, help="turns of the timing, in five comparisons")
    parser.add_argument("--measure", action="store_true", help="only time the models of --work again")
    parser.set_defaults(**defaults)
    return parser
