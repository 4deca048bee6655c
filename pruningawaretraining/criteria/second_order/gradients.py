"""Gradients and layer inputs for the second-order criteria, gathered without a trace in the model.

Shape suffixes: ``_W`` the shape of a weight, ``_XX`` a square over a layer's inputs.

``.grad``, train and eval modes, buffers (running statistics), ``requires_grad`` and the random states of torch, numpy,
Python and the data loader are afterwards as they were.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.criteria.second_order.batches import inputs_and_targets, split
from pruningawaretraining.criteria.second_order.untouched import untouched
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.models.calling import (
    call,
    differentiable,
    first_line,
    move,
    shown,
)

logger = logging.getLogger(__name__)

LossFn = Callable[[Any, Any], Tensor]
Statistic = tuple[Tensor, Tensor, Tensor]


@dataclass(eq=False)
class Calibration:
    """The data, the model and the loss whose curvature is measured.

    Args:
        model: the model, without a wrapper.
        dataloader: batches, each ``(inputs, targets)`` or a mapping of keyword inputs; anything that can be iterated,
            again and again or once.
        loss_fn: ``(outputs, targets) -> loss``; for a mapping the targets are its "labels" (or the whole batch).
        micro_batch: samples behind each gradient; None for the loader's batches.
    """

    model: nn.Module
    dataloader: Iterable[Any]
    loss_fn: LossFn
    micro_batch: int | None = None

    @property
    def device(self) -> torch.device:
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """(inputs, targets) of one micro-batch after the other, over and over.

        Ends when the loader gives nothing at a second pass, as an iterator does that can be read only once.

        Raises:
            ConfigError: the loader is empty, or cannot be iterated.
        """
        given: Any = self.dataloader
        if not isinstance(given, Iterable) and not hasattr(given, "__getitem__"):
            raise ConfigError(f"dataloader: {shown(given)} cannot be iterated. Allowed: batches")
        for turn in itertools.count():
            seen = False
            for batch in self.dataloader:
                for part in split(batch, self.micro_batch):
                    seen = True
                    inputs, targets = inputs_and_targets(part)
                    yield move(inputs, self.device), move(targets, self.device)
            if not seen:
                if turn == 0:
                    ended = isinstance(self.dataloader, Iterator)
                    what = "it has been read to its end; give one that can be read again" if ended else "it is empty"
                    raise ConfigError(f"dataloader: {what}; at least one batch is needed")
                return

    def example(self) -> Any:
        """The inputs of the first micro-batch."""
        with untouched(self.model, self.dataloader):
            return next(self.batches())[0]

    def loss(self, inputs: Any, targets: Any) -> Tensor:
        """The loss of one micro-batch.

        Raises:
            ConfigError: the loss is not a function.
            ModelError: the loss is not a single finite number.
        """
        if not callable(self.loss_fn):
            raise ConfigError(f"loss_fn: {shown(self.loss_fn)} is not a function of (outputs, targets)")
        outputs = self._outputs(inputs)
        try:
            loss = self.loss_fn(outputs, targets)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ModelError(
                f"loss_fn: it does not work on {shown(outputs)} and {shown(targets)}: {first_line(error)}. Allowed: a "
                "function of (outputs, targets)"
            ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ModelError(f"loss_fn: it gives {shown(loss)}; a tensor with one element is needed")
        if not bool(torch.isfinite(loss.detach()).all()):
            raise ModelError(f"loss_fn: the loss is {float(loss.detach())}; the model or the data is not finite")
        return loss.reshape(())

    def _outputs(self, inputs: Any) -> Any:
        """Outputs of the model for a micro-batch.

        Raises:
            ModelError: it does not run on them.
        """
        try:
            return call(self.model, self._without_labels(inputs))
        except torch.OutOfMemoryError:
            raise
        except (TypeError, RuntimeError) as error:
            raise ModelError(
                f"dataloader: the model does not run on its batches ({_described(inputs)}): {first_line(error)}. "
                "Allowed: (inputs, targets), or a mapping of the model's keyword inputs"
            ) from error

    def _without_labels(self, inputs: Any) -> Any:
        """Keyword inputs without "labels", where the model does not take any."""
        if not isinstance(inputs, Mapping) or "labels" not in inputs:
            return inputs
        known = inspect.signature(self.model.forward).parameters
        takes = "labels" in known or any(one.kind is one.VAR_KEYWORD for one in known.values())
        return inputs if takes else {key: value for key, value in inputs.items() if key != "labels"}

    def _differentiable_loss(self, inputs: Any, targets: Any) -> Tensor:
        loss = self.loss(inputs, targets)
        if not loss.requires_grad:
            raise ModelError("loss_fn: the loss does not depend on the weights; is an output detached on its way?")
        return loss

    def each_gradient(self, parameters: Sequence[Tensor], count: int, consume: Callable[[list[Tensor]], None]) -> int:
        """Hand ``count`` gradients of the loss, one at a time, to a function.

        Args:
            parameters: what to differentiate by.
            count: how many; fewer if the data ends for good, which is said.
            consume: called with one tensor for each parameter.

        Returns:
            How many there were.
        """
        done = 0
        with untouched(self.model, self.dataloader), differentiable(self.model), _recording():
            for inputs, targets in itertools.islice(self.batches(), count):
                loss = self._differentiable_loss(inputs, targets)
                found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
                consume([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)])
                done += 1
        if done < count:
            logger.warning("num_grads: %d were asked for, the data gave %d", count, done)
        return done

    def each_backward(self, count: int, consume: Callable[[], None]) -> None:
        """Leave the gradients of one micro-batch after the other in ``.grad``; for private copies only.

        Args:
            count: micro-batches; fewer if the data ends for good.
            consume: called after each.
        """
        with untouched(self.model, self.dataloader), differentiable(self.model), _recording():
            for inputs, targets in itertools.islice(self.batches(), count):
                self.model.zero_grad(set_to_none=True)
                self._differentiable_loss(inputs, targets).backward()  # type: ignore[no-untyped-call]
                consume()

    def run(self, count: int) -> int:
        """Run the model on ``count`` micro-batches for its hooks' sake, without gradients."""
        done = 0
        with untouched(self.model, self.dataloader), torch.no_grad():
            for inputs, _ in itertools.islice(self.batches(), count):
                self._outputs(inputs)
                done += 1
        return done

    def outputs(self, batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """(outputs, targets) of given batches, in eval mode."""
        with untouched(self.model, self.dataloader), torch.no_grad():
            for batch in batches:
                inputs, targets = inputs_and_targets(batch)
                yield self._outputs(move(inputs, self.device)), move(targets, self.device)

    def normalise_anew(self, norms: Sequence[nn.modules.batchnorm._BatchNorm], count: int) -> list[Statistic]:
        """Running means and variances of batch norms as plain averages over ``count`` micro-batches.

        The norms are in train mode while that is measured, everything else in eval mode; the model is afterwards as it
        was.

        Returns:
            (mean, variance, batches seen) of each norm.
        """
        momenta = [norm.momentum for norm in norms]
        try:
            with untouched(self.model, self.dataloader), torch.no_grad():
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # a cumulative average
                    norm.training = True
                for inputs, _ in itertools.islice(self.batches(), count):
                    self._outputs(inputs)
                return [_statistic(norm) for norm in norms]
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def _statistic(norm: nn.modules.batchnorm._BatchNorm) -> Statistic:
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    return norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()


def _described(inputs: Any) -> str:
    if isinstance(inputs, Mapping):
        return ", ".join(f"{key}: {shown(value)}" for key, value in inputs.items())
    return ", ".join(map(shown, inputs)) if isinstance(inputs, tuple) else shown(inputs)


@contextmanager
def _recording() -> Iterator[None]:
    """Gradients are recorded, even if the caller is in no_grad or inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
