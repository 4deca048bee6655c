"""Example inputs of a model, taken from a call; they follow the model's moves."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pruningawaretraining.models.trees import map_tensors, tensors_of

Place = tuple[torch.device, torch.dtype]
LABELS = frozenset({"label", "labels", "target", "targets", "cls", "bboxes"})
"""Names under which batches hold what the loss is computed with."""


class Example:
    """Inputs that follow a model to another device or dtype.

    Args:
        inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs, as the model takes them now; None
            where none are known yet.
        model: the model.
    """

    def __init__(self, inputs: Any, model: nn.Module | None) -> None:
        self._inputs, self._model, self._place = inputs, model, place_of(model)

    @property
    def inputs(self) -> Any:
        """The inputs as the model takes them now: tensors of the dtype that it had have the one that it has."""
        here = place_of(self._model)
        if here is not None and self._place is not None and here != self._place and self._inputs is not None:
            (_, before), (device, after) = self._place, here
            self._inputs = map_tensors(
                lambda one: one.to(device, after if one.dtype is before else one.dtype), self._inputs
            )
        self._place = here
        return self._inputs


def place_of(model: nn.Module | None) -> Place | None:
    """Device and dtype of a model's first parameter of a floating dtype."""
    parameters = () if model is None else model.parameters()
    return next(((one.device, one.dtype) for one in parameters if one.is_floating_point()), None)


def as_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call's arguments as a tuple of positional inputs, or a dict of keyword inputs."""
    if not kwargs:
        return args
    if not args:
        return kwargs
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


def without_labels(module: nn.Module, inputs: Any) -> Any:
    """Inputs of a call without what makes the model give a loss; None where they are a training batch as a whole.

    Args:
        module: the model.
        inputs: as :func:`as_inputs` gives them.
    """
    if isinstance(inputs, tuple):
        return None if any(isinstance(one, Mapping) and LABELS & one.keys() for one in inputs) else inputs
    parameters = inspect.signature(module.forward).parameters
    optional = {name for name in LABELS & inputs.keys() if name in parameters and parameters[name].default is None}
    inputs = {name: value for name, value in inputs.items() if name not in optional}
    whole = any(isinstance(one, Mapping) and LABELS & one.keys() for one in inputs.values())
    return None if whole or not any(True for _ in tensors_of(inputs)) else inputs


def one_example(inputs: Any) -> Any:
    """The first example of a batch, detached; the whole batch where tensors do not share a first dimension."""
    tensors = list(tensors_of(inputs))
    batch = {tensor.shape[0] for tensor in tensors if tensor.dim() > 0}
    single = len(batch) == 1 and all(tensor.dim() > 0 for tensor in tensors)

    return map_tensors(lambda tensor: (tensor[:1] if single else tensor).detach().clone(), inputs)


def batch_of(inputs: Any) -> int:
    """Rows of a batch: the first dimension of a tensor, or of tensors in a tuple or dict; 1 for other inputs."""
    parts = tuple(inputs.values()) if isinstance(inputs, dict) else inputs
    parts = parts if isinstance(parts, tuple) else (parts,)
    sizes = {int(one.shape[0]) for one in parts if isinstance(one, torch.Tensor) and one.dim() > 1}
    whole = all(isinstance(one, torch.Tensor) for one in parts)
    return sizes.pop() if whole and len(sizes) == 1 else 1
