"""One epoch of training and one of testing.

Shape suffixes: ``_BCHW`` a batch of images, ``_BK`` class scores, ``_B`` labels or losses of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining.distributed.collectives import totals
from pruningawaretraining.errors import ModelError, PruningError
from pruningawaretraining.experiment.data import Batch
from pruningawaretraining.experiment.schema import ExperimentConfig
from pruningawaretraining.session.pruning import Pruning

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Tick = Callable[[], None]


class DivergedError(PruningError):
    """The training loss is not finite any more."""


@dataclass(frozen=True)
class Precision:
    """Automatic mixed precision.

    Attributes:
        device: where the model is.
        dtype: of matrix products and convolutions; None for float32 throughout.
        scaler: scales the loss of float16 training; does nothing otherwise.
    """

    device: torch.device
    dtype: torch.dtype | None
    scaler: torch.amp.GradScaler

    @classmethod
    def of(cls, config: ExperimentConfig, device: torch.device) -> Precision:
        """The precision of an experiment."""
        scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        return cls(device, AMP_DTYPES.get(config.amp), scaler)

    def autocast(self) -> AbstractContextManager[object]:
        """A context for the forward pass."""
        if self.dtype is None and not torch.amp.is_autocast_available(self.device.type):
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)


@dataclass(frozen=True)
class Learner:
    """A model with what trains it.

    Attributes:
        model: the network.
        optimizer: over all its parameters.
        precision: see :class:`Precision`.
        label_smoothing: of the cross entropy.
        clip_norm: largest norm of all gradients, or None.
        pruner: None for the dense baseline.
        wrapped: the model as several processes train it; None for the model itself.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    pruner: Pruning | None = None
    wrapped: nn.Module | None = None


@dataclass
class Sums:
    """Progress of an epoch.

    Attributes:
        loss: sum of the losses of all images.
        right: images that were right.
        seen: images.
        steps: batches.
    """

    loss: Tensor
    right: Tensor
    seen: Tensor
    steps: int = 0

    @classmethod
    def on(cls, device: torch.device, values: Mapping[str, float] | None = None) -> Sums:
        """The sums that :meth:`values` gave, or zeros."""
        given = values or {"loss": 0.0, "right": 0.0, "seen": 0.0, "steps": 0}
        loss, right = (torch.tensor(float(given[key]), device=device) for key in ("loss", "right"))
        return cls(loss, right, torch.tensor(float(given["seen"])), int(given["steps"]))

    def values(self) -> dict[str, float]:
        """As plain numbers."""
        return {"loss": float(self.loss), "right": float(self.right), "seen": float(self.seen), "steps": self.steps}


def train_epoch(
    learner: Learner, batches: Iterator[Batch], tick: Tick, sums: Sums | None = None
) -> tuple[float, float]:
    """Train on every batch once.

    Args:
        learner: the model; it is left in training mode.
        batches: normalised images and labels.
        tick: called after every batch.
        sums: of the batches before, to which these are added; None to begin.

    Returns:
        Mean loss (without penalties) and accuracy over the epoch.

    Raises:
        DivergedError: the loss is not finite.
    """
    learner.model.train()
    sums = sums or Sums.on(learner.precision.device)
    for images_BCHW, labels_B in batches:
        loss, correct = train_step(learner, images_BCHW, labels_B)
        sums.loss += loss * len(labels_B)
        sums.right += correct
        sums.seen += len(labels_B)
        sums.steps += 1
        tick()
    all_loss, all_right, count = (float(one) for one in totals([sums.loss, sums.right, sums.seen]))
    mean = all_loss / max(count, 1)
    if not math.isfinite(mean):
        raise DivergedError(
            f"optimizer.lr: {_lr(learner.optimizer):g} makes the training loss {mean}. Allowed: a smaller one"
        )
    return mean, all_right / max(count, 1)


def train_step(learner: Learner, images_BCHW: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the optimizer: the loss and the number of images that were right, still on the device."""
    pruner, scaler = learner.pruner, learner.precision.scaler
    learner.optimizer.zero_grad(set_to_none=True)
    with learner.precision.autocast():
        outputs = (learner.wrapped or learner.model)(images_BCHW)
        scores_BK = scores_of(outputs)
        loss = functional.cross_entropy(scores_BK.float(), labels_B, label_smoothing=learner.label_smoothing)
        penalised = loss if pruner is None else loss + pruner.distill_loss(outputs, images_BCHW)
    if pruner is not None:
        penalised = penalised + pruner.slice_regularize(learner.model)
    scaler.scale(penalised).backward()  # type: ignore[no-untyped-call]
    scaler.unscale_(learner.optimizer)
    if pruner is not None:
        pruner.channel_regularize(learner.model)
    if learner.clip_norm is not None:
        nn.utils.clip_grad_norm_(learner.model.parameters(), learner.clip_norm)
    scaler.step(learner.optimizer)
    scaler.update()
    return loss.detach(), (scores_BK.detach().argmax(1) == labels_B).sum()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterator[Batch], precision: Precision) -> float:
    """Accuracy over the batches of all processes, in eval mode; the model is left in eval mode."""
    model.eval()
    right, seen = torch.zeros((), device=precision.device), 0
    for images_BCHW, labels_B in batches:
        with precision.autocast():
            scores_BK = scores_of(model(images_BCHW))
        right += (scores_BK.argmax(1) == labels_B).sum()
        seen += len(labels_B)
    right, count = totals([right, torch.tensor(float(seen))])
    return float(right) / max(float(count), 1)


def scores_of(output: Any) -> Tensor:
    """The class scores in what a model returns: a tensor, or something with ``logits``.

    Raises:
        ModelError: it is neither.
    """
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor) or found.dim() != 2:
        what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(output).__name__}"
        raise ModelError(
            f"model: its output is {what}. Allowed: class scores (batch, classes), or an object with .logits"
        )
    return found


def _lr(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])
