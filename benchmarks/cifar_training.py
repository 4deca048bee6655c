"""How every way of ``cifar_resnet56.py`` is trained: data on the device, augmentation, rates, evaluation.

Shape suffixes: ``_BCHW`` images, ``_B`` one number an image.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from one_shot_cifar import MEAN, STD, Batches
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Distiller


class OutOfTime(RuntimeError):
    """The time that was given has passed."""


@dataclass(frozen=True)
class Budget:
    """What one form of the benchmark spends.

    Args:
        images: of the training set, from its start.
        test: first and last + 1 of the test images that are reported.
        sparse_epochs, tune_epochs: of the two phases.
        seeds, targets: to run.
        strength: of the growing penalty, ours and theirs.
    """

    name: str
    images: int
    test: tuple[int, int]
    sparse_epochs: int
    tune_epochs: int
    batch: int
    lr: float
    seeds: int
    targets: tuple[float, ...]
    decay: float = 5e-4
    strength: float = 5e-4

    @property
    def steps_an_epoch(self) -> int:
        return self.images // self.batch

    @property
    def steps(self) -> int:
        return self.steps_an_epoch * (self.sparse_epochs + self.tune_epochs)

    def optimizer(self, parameters: Iterable[Any], decay: float | None = None) -> torch.optim.SGD:
        """The optimizer of a phase."""
        decay = self.decay if decay is None else decay
        return torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=decay)


BUDGETS = {
    "small": Budget("small", 4_000, (8_000, 10_000), 1, 1, 64, 0.005, 2, (2.11,)),
    "full": Budget("full", 50_000, (2_000, 10_000), 20, 20, 128, 0.01, 3, (2.11, 2.57)),
}


@dataclass(frozen=True)
class Data:
    """CIFAR-10 on the device.

    Args:
        images_BCHW: training images in [0, 1].
        labels_B: theirs.
        test: normalised.
        calibration: training images in batches, with the augmentation of the training: the network's norms were
            measured on such images, and measured on plain ones its accuracy falls by three points before any pruning.
        example: one input, for tracing.
    """

    images_BCHW: Tensor
    labels_B: Tensor
    test: Batches
    calibration: Batches
    example: Tensor

    @property
    def device(self) -> torch.device:
        return self.images_BCHW.device

    @classmethod
    def load(cls, loader: Any, budget: Budget, device: torch.device) -> Data:
        """Decode the images that the budget needs."""
        pixels, labels, _ = loader.cifar10("train")
        images_BCHW, labels_B = _on(device, pixels[: budget.images], labels[: budget.images])
        first, last = budget.test
        pixels, labels, _ = loader.cifar10("test")
        test_BCHW, test_B = _on(device, pixels[first:last], labels[first:last])
        return cls(
            images_BCHW,
            labels_B,
            Batches(normalised(test_BCHW), test_B, 250),
            Batches(normalised(augmented(images_BCHW[:1024], torch.Generator().manual_seed(0))), labels_B[:1024], 64),
            torch.randn(1, 3, 32, 32, device=device),
        )


def _on(device: torch.device, pixels: Any, labels: Any) -> tuple[Tensor, Tensor]:
    images_BCHW = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255
    return images_BCHW, torch.from_numpy(labels).to(device)


def normalised(images_BCHW: Tensor) -> Tensor:
    """As the network was trained."""
    mean, std = (torch.tensor(one, device=images_BCHW.device).view(1, 3, 1, 1) for one in (MEAN, STD))
    return ((images_BCHW - mean) / std).contiguous(memory_format=torch.channels_last)


def augmented(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops after a padding of 4, and flips, all on the images' device; the draws come from the CPU."""
    device, count, side = images_BCHW.device, len(images_BCHW), images_BCHW.shape[-1]
    offsets = torch.randint(0, 9, (2, count), generator=generator).to(device)
    flips_B = (torch.rand(count, generator=generator) < 0.5).to(device)
    places = torch.arange(side, device=device)
    rows = offsets[0][:, None] + places
    columns = offsets[1][:, None] + torch.where(flips_B[:, None], side - 1 - places, places)
    padded = functional.pad(images_BCHW, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    chosen = padded[torch.arange(count, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return chosen.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    Args:
        first, last: epochs of the phase, ``last`` not included.
        deadline: of ``time.perf_counter``.
        tuning: the second phase, in which the rate falls to 0.
    """

    budget: Budget
    seed: int
    first: int
    last: int
    deadline: float
    tuning: bool

    @property
    def steps(self) -> int:
        return (self.last - self.first) * self.budget.steps_an_epoch

    def rate(self, epoch: float) -> float:
        """The learning rate at a fraction of an epoch."""
        if not self.tuning:
            return self.budget.lr
        return self.budget.lr * 0.5 * (1 + math.cos(math.pi * epoch / self.budget.tune_epochs))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    phase: Phase,
    distiller: Distiller | None = None,
    regularize: Callable[[], None] | None = None,
    stepped: Callable[[int], None] | None = None,
) -> None:
    """Train for a phase.

    Args:
        model, optimizer: what is trained.
        data, phase: on what, how long.
        distiller: adds a teacher's part to the loss.
        regularize: called after every backward pass.
        stepped: called after every step with the number of steps so far.

    Raises:
        OutOfTime: the deadline has passed.
    """
    batch, done = phase.budget.batch, 0
    model.train()
    for epoch in range(phase.first, phase.last):
        generator = torch.Generator().manual_seed(10_000 * phase.seed + 100 * phase.tuning + epoch)
        order = torch.randperm(len(data.labels_B), generator=generator).to(data.device)
        for start in range(0, len(order) - batch + 1, batch):
            if time.perf_counter() > phase.deadline:
                raise OutOfTime
            chosen = order[start : start + batch]
            images_BCHW = normalised(augmented(data.images_BCHW[chosen], generator))
            for group in optimizer.param_groups:
                group["lr"] = phase.rate(epoch + start / len(order))
            optimizer.zero_grad()
            with torch.autocast(data.device.type, torch.bfloat16, enabled=data.device.type == "cuda"):
                outputs = model(images_BCHW)
                loss = functional.cross_entropy(outputs, data.labels_B[chosen])
                if distiller is not None:
                    loss = loss + distiller.loss(outputs, images_BCHW)
            loss.backward()
            if regularize is not None:
                regularize()
            optimizer.step()
            done += 1
            if stepped is not None:
                stepped(done)


@torch.no_grad()
def evaluate(model: nn.Module, data: Data) -> float:
    """Top-1 on the test images, in percent; the mode is left as it was."""
    training = model.training
    model.eval()
    right = sum((model(images).argmax(1) == labels).sum() for images, labels in data.test)
    model.train(training)
    return 100 * float(right) / len(data.test.labels)
