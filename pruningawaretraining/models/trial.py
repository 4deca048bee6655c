"""Whether a model runs at all, tried without data on the meta device, where shapes are computed and values are not.

Inputs are guessed from the model: from its first layer, or the dummy inputs that models of transformers have. What the
dense model does not accept proves nothing of the pruned one. On inputs that are given, the model itself is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.errors import ModelError
from pruningawaretraining.files import BROKEN
from pruningawaretraining.models.calling import evaluating, first_line, outputs_of, same_generators, unwrap
from pruningawaretraining.models.trees import map_tensors

Conv = nn.modules.conv._ConvNd
SIDES = {1: (64, 1024), 2: (32, 224, 64, 28), 3: (16, 32)}
"""Dimensions of a convolution -> sides of the inputs that are tried."""


class Trial:
    """A model's forward pass on guessed or given inputs, tried now, so that it can be tried again after a change.

    Args:
        model: as it is before the change. On guesses nothing of it is changed or computed; models with forward hooks,
            which would be called, are not tried.
        given: inputs to run it with, instead: a tensor, a tuple of positional inputs or a dict of keyword inputs.

    Raises:
        ModelError: the model does not run with what is given.
    """

    def __init__(self, model: nn.Module, given: Any = None) -> None:
        self.model, self._given = unwrap(model), given
        self._guess: int | None = None
        if given is not None:
            outputs_of(self.model, given)
            return
        hooked = any(one._forward_hooks or one._forward_pre_hooks for one in self.model.modules())
        guesses = [] if hooked else list(_guesses(self.model))
        self._guess = next((number for number, one in enumerate(guesses) if self._failure(one) is None), None)
        self._before = None if self._guess is None else guesses[self._guess]

    @property
    def runs(self) -> bool:
        """Whether the model ran, so that it is known whether it does after the change."""
        return self._given is not None or self._guess is not None

    @property
    def inputs(self) -> Any:
        """The inputs that the model took, as wide as its first layer is now; None if it took none."""
        return None if self._guess is None else list(_guesses(self.model))[self._guess]

    def failure(self) -> str | None:
        """Why the model does not run any more; None if it does, or if it was never known to run."""
        if self._given is not None:
            try:
                outputs_of(self.model, self._given)
            except ModelError as error:
                return first_line(error.__cause__ or error)
            return None
        inputs = self.inputs
        failure = None if inputs is None else self._failure(inputs)
        if failure is not None and self._before is not None:  # the first layer may not be the one that reads them
            return None if self._failure(self._before) is None else failure
        return failure

    def _failure(self, inputs: Any) -> str | None:
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        state = {name: tensor.detach().to("meta") for name, tensor in named}
        try:
            with torch.no_grad(), evaluating(self.model), same_generators(self.model):
                if isinstance(inputs, Mapping):
                    torch.func.functional_call(self.model, state, (), dict(inputs))
                else:
                    torch.func.functional_call(self.model, state, (inputs,))
        except BROKEN as error:
            return first_line(error)
        return None


def _guesses(model: nn.Module) -> Iterator[Any]:
    """Inputs that the model may be meant for, by itself or by its first layer with weights."""
    own = getattr(model, "dummy_inputs", None)
    if isinstance(own, Mapping) and any(isinstance(one, Tensor) for one in own.values()):
        yield map_tensors(lambda one: one.to("meta"), dict(own))
    kinds = (Conv, nn.Linear, nn.Embedding)
    first = next((module for module in model.modules() if isinstance(module, kinds)), None)
    if isinstance(first, nn.modules.linear.NonDynamicallyQuantizableLinear):  # inside an attention, which comes first
        return
    if isinstance(first, Conv):
        spatial = first.weight.dim() - 2
        for side in (*_declared(model), *SIDES.get(spatial, ())):
            yield torch.empty((2, first.in_channels, *[side] * spatial), device="meta")
    elif isinstance(first, nn.Linear):
        for shape in ((2,), (2, 5)):
            yield torch.empty((*shape, first.in_features), device="meta")
    elif isinstance(first, nn.Embedding):
        yield torch.empty((2, 5), dtype=torch.int64, device="meta")


def _declared(model: nn.Module) -> Iterator[int]:
    """The side of images that a model of torchvision or timm says it takes."""
    declared: Any = getattr(model, "image_size", None)
    config = getattr(model, "default_cfg", None)
    sizes = config.get("input_size") if isinstance(config, dict) else None
    for side in (declared, sizes[-1] if sizes else None):
        if isinstance(side, int):
            yield side
