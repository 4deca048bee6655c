"""Example inputs of a model: taken from a call of it, and moved when it is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.models.calling import move, tensors_of

Place = tuple[torch.device, torch.dtype]


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
            self._inputs = _cast(move(self._inputs, here[0]), self._place[1], here[1])
        self._place = here
        return self._inputs


def place_of(model: nn.Module | None) -> Place | None:
    """Device and dtype of a model's first parameter of a floating dtype."""
    parameters = () if model is None else model.parameters()
    return next(((one.device, one.dtype) for one in parameters if one.is_floating_point()), None)


def _cast(inputs: Any, before: torch.dtype, after: torch.dtype) -> Any:
    """The same nest with tensors of one dtype in another."""
    if isinstance(inputs, Tensor):
        return inputs.to(after) if inputs.dtype is before else inputs
    if isinstance(inputs, Mapping):
        return {key: _cast(value, before, after) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(_cast(value, before, after) for value in inputs)
    return inputs


def as_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call's arguments as a tuple of positional inputs, or a dict of keyword inputs."""
    if not kwargs:
        return args
    if not args:
        return kwargs
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


def one_example(inputs: Any) -> Any:
    """The first example of a batch, detached; the whole batch where tensors do not share a first dimension."""
    tensors = list(tensors_of(inputs))
    batch = {tensor.shape[0] for tensor in tensors if tensor.dim() > 0}
    single = len(batch) == 1 and all(tensor.dim() > 0 for tensor in tensors)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return (value[:1] if single else value).detach().clone()
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(cut(item) for item in value)
        return value

    return cut(inputs)
