"""How every row of ``cifar_medium.py`` is trained: images, rates, a run that can be gone on with.

Shape suffixes: ``_BCHW`` images, ``_B`` one number an image, ``_BC`` scores.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cifar_medium_ways import Method, Setting, Way
from cifar_training import augmented, normalised
from one_shot_cifar import Batches
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from pruningawaretraining import count_macs
from pruningawaretraining.experiment.models import CifarResNet
from pruningawaretraining.recovery import averaged, measure_norms, take_average
from pruningawaretraining.session.distillation_losses import logits_loss


@dataclass(frozen=True)
class Form:
    """What a run spends.

    Args:
        epochs, batch, rate, decay: of the training.
        warm: epochs over which the rate rises.
        held_out: training images at the end that are tested on, and not trained on; 0 for the test images.
        averaged: epochs at the end over which weights are averaged.
        momentum: of the average.
        share, temperature: of the teacher's part of the loss, where there is one.
    """

    epochs: int = 10
    batch: int = 128
    rate: float = 0.02
    decay: float = 5e-4
    warm: float = 0.5
    held_out: int = 0
    averaged: int = 3
    momentum: float = 0.998
    share: float = 0.7
    temperature: float = 4.0

    def rate_at(self, epoch: float) -> float:
        """The learning rate at a fraction of an epoch."""
        return self.rate * min(1.0, epoch / self.warm + 0.02) * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))


class Images:
    """CIFAR-10 as a few tensors.

    Args:
        loader: the data folder's module.
        form: how many images are held out.
    """

    def __init__(self, loader: Any, form: Form) -> None:
        pixels, labels, _ = loader.cifar10("train")
        stop = len(labels) - form.held_out
        self.train_BCHW, self.labels_B = _tensors(pixels[:stop], labels[:stop])
        if not form.held_out:
            pixels, labels, _ = loader.cifar10("test")
            stop = 0
        tests_BCHW, tests_B = _tensors(pixels[stop:], labels[stop:])
        self.test = Batches(normalised(tests_BCHW.float() / 255), tests_B, 250)
        first = torch.arange(min(1024, len(self.labels_B)))
        drawn_BCHW = self.augment(first, torch.Generator().manual_seed(0))
        self.calibration = Batches(drawn_BCHW, self.labels_B[first], 64)

    def augment(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Some training images as the network is trained on them."""
        return normalised(augmented(self.train_BCHW[chosen], generator).float() / 255)

    def epoch(self, seed: int, epoch: int, batch: int) -> Any:
        """Images and labels of every batch of an epoch; the draws depend on seed and epoch alone."""
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(self.labels_B), generator=generator)
        for start in range(0, len(order) - batch + 1, batch):
            chosen = order[start : start + batch]
            yield self.augment(chosen, generator), self.labels_B[chosen]


def _tensors(pixels: Any, labels: Any) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


@torch.no_grad()
def evaluate(model: nn.Module, test: Batches) -> float:
    """Top-1 in percent; the mode is left as it was."""
    training = model.training
    model.eval()
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in test)
    model.train(training)
    return 100 * right / len(test.labels)


class Run:
    """One way, target and seed, in files of its own.

    Args:
        work: the folder.
        way, target, seed: what is run.
        form: how.
    """

    def __init__(self, work: Path, way: Way, target: float, seed: int, form: Form) -> None:
        self.work, self.way, self.target, self.seed, self.form = work, way, target, seed, form
        self.key = way.key if len(way.targets) == 1 and target == 1.0 else f"{way.key}-{target}"
        choosing = f"choose-{form.epochs}-{form.rate:g}-" if form.held_out else ""
        self.file = work / f"{choosing}{self.key}-seed{seed}.json"
        self.state_file, self.lock = self.file.with_suffix(".pt"), self.file.with_suffix(".lock")

    def run(self, loader: Any, images: Images) -> dict[str, Any]:
        """Train, or the rest of it; the result is in ``file``."""
        form, method = self.form, self._method(loader, images)
        model = method.model
        state: dict[str, Any] = {"epoch": 0, "seconds": 0.0, "average": None, "accuracies": []}
        if self.state_file.is_file():
            state = torch.load(self.state_file, weights_only=True)
            method.resume(state["method"])
        else:
            method.begin()
        average = None
        for epoch in range(state["epoch"], form.epochs):
            if average is None and epoch >= form.epochs - form.averaged:
                average = self._average(model, state["average"])
            started = time.process_time()
            self._epoch(method, images, epoch, average)
            state["seconds"] += time.process_time() - started
            state["accuracies"].append(evaluate(model, images.test) if form.held_out else None)
            state |= {"epoch": epoch + 1, "average": None if average is None else average.state_dict()}
            self._save({**state, "method": method.state()})
            print(f"{self.file.stem}: epoch {epoch + 1}, {state['seconds']:.0f} CPU s", file=sys.stderr, flush=True)
        method.finish()
        found = self._result(method, images, average or self._average(model, state["average"]), state)
        self.file.write_text(json.dumps(found) + "\n")
        self.state_file.unlink(missing_ok=True)
        return found

    def _method(self, loader: Any, images: Images) -> Method:
        """The way's method on the pretrained network, which is kept beside it."""
        torch.manual_seed(self.seed)
        self.dense, model = (CifarResNet(20).to(memory_format=torch.channels_last) for _ in range(2))
        for one in (self.dense, model):
            one.load_state_dict(loader.cifar_resnet_state(20))
        form, steps = self.form, len(images.labels_B) // self.form.batch
        example = torch.zeros(1, 3, 32, 32)
        setting = Setting(form.epochs, steps, form.rate, form.decay, 5e-4, images.calibration, example)
        return self.way.method(model, setting, self.target, **self.way.options)

    def _epoch(self, method: Method, images: Images, epoch: int, average: AveragedModel | None) -> None:
        model, form, done = method.model, self.form, epoch * method.setting.steps
        scores = self._teacher_scores(images, epoch) if self.way.taught else None
        model.train()
        for number, (images_BCHW, labels_B) in enumerate(images.epoch(self.seed, epoch, form.batch)):
            for group in method.optimizer.param_groups:
                group["lr"] = form.rate_at(epoch + number / method.setting.steps)
            method.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                outputs_BC = model(images_BCHW)
            loss = functional.cross_entropy(outputs_BC.float(), labels_B)
            if scores is not None:
                taught = logits_loss(outputs_BC, scores[number], form.temperature)
                loss = (1 - form.share) * loss + form.share * taught
            loss.backward()
            method.regularize()
            method.optimizer.step()
            done += 1
            method.stepped(done)
            if average is not None:
                average.update_parameters(model)

    @torch.no_grad()
    def _teacher_scores(self, images: Images, epoch: int) -> Tensor:
        """The dense network's scores for every batch of an epoch, which all taught runs of a seed share."""
        path = self.work / f"teacher-{self.seed}-{epoch}-{self.form.held_out}.pt"
        if not path.is_file():
            self.dense.eval()
            with torch.autocast("cpu", torch.bfloat16):
                batches = images.epoch(self.seed, epoch, self.form.batch)
                scores = torch.stack([self.dense(images_BCHW).float() for images_BCHW, _ in batches])
            part = path.with_suffix(f".{os.getpid()}")
            torch.save(scores, part)
            part.replace(path)
        found: Tensor = torch.load(path, weights_only=True)
        return found

    def _average(self, model: nn.Module, state: Any) -> AveragedModel:
        average = averaged(model, "ema", self.form.momentum)
        if state is not None:
            average.load_state_dict(state)
        return average

    def _save(self, state: dict[str, Any]) -> None:
        part = self.state_file.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.state_file)

    @torch.no_grad()
    def _result(self, method: Method, images: Images, average: AveragedModel, state: dict[str, Any]) -> dict[str, Any]:
        model, example = method.model, method.setting.example
        weights = [one for name, one in model.named_parameters() if one.ndim > 1 and name != "conv1.weight"]
        found = {
            "key": self.key,
            "way": self.way.key,
            "target": self.target,
            "seed": self.seed,
            "dense": evaluate(self.dense, images.test),
            "after": evaluate(model, images.test),
            "reduction": count_macs(self.dense, example) / count_macs(model, example),
            "zeros": sum(int((one == 0).sum()) for one in weights) / sum(one.numel() for one in weights),
            "seconds": state["seconds"],
            "rate": self.form.rate,
            "epochs": self.form.epochs,
            **({"accuracies": state["accuracies"]} if self.form.held_out else {}),
        }
        take_average(model, average)  # what is masked stays so
        measure_norms(model, images.epoch(self.seed, self.form.epochs, self.form.batch), 50)
        return {**found, "averaged": evaluate(model, images.test)}
