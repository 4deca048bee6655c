"""Parts of a model that only training runs, such as auxiliary heads: they read channels too."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from pruningawaretraining.errors import ModelError
from pruningawaretraining.models.calling import ForwardFn, checked_call, evaluating

logger = logging.getLogger(__name__)

Mode = Callable[[nn.Module], AbstractContextManager[None]]


@contextmanager
def as_in_training(model: nn.Module) -> Iterator[None]:
    """Containers are in training mode; layers (norms, dropout), and whatever has buffers itself, are not.

    So no statistics are updated: a norm may have parts of its own, such as timm's with their activation.
    """
    with evaluating(model), torch.random.fork_rng(devices=[]):
        for module in model.modules():
            module.training = not _is_leaf(module) and next(module.buffers(recurse=False), None) is None
        yield


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or next(module.children(), None) is None


def mode_to_trace(model: nn.Module, inputs: Any, forward_fn: ForwardFn | None = None) -> Mode:
    """The mode in which every layer runs: eval mode, or that of training where some layers run in it alone.

    Args:
        model: the model; nothing in it changes.
        inputs: example inputs.
        forward_fn: see :func:`pruningawaretraining.models.calling.call`.

    Raises:
        ModelError: the model rejects the inputs.
    """
    layers = {module: name for name, module in model.named_modules() if _is_leaf(module) and _has_weights(module)}
    idle = set(layers) - _seen(model, layers, inputs, forward_fn, evaluating)
    if not idle:
        return evaluating
    try:
        woken = idle & _seen(model, layers, inputs, forward_fn, as_in_training)
    except ModelError as error:
        logger.warning(
            "%s: not run in eval mode, and the example inputs do not suit training; if they read channels in training, "
            "exclude the layers before them (%s)",
            ", ".join(sorted(layers[module] for module in idle)[:4]),
            error,
        )
        return evaluating
    return as_in_training if woken else evaluating


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _seen(
    model: nn.Module, layers: dict[nn.Module, str], inputs: Any, forward_fn: ForwardFn | None, mode: Mode
) -> set[nn.Module]:
    """The layers that run in a mode."""
    seen: set[nn.Module] = set()
    handles = [layer.register_forward_pre_hook(lambda module, _: seen.add(module)) for layer in layers]
    try:
        with torch.no_grad(), mode(model):
            checked_call(model, inputs, forward_fn)
    finally:
        for handle in handles:
            handle.remove()
    return seen
