"""Whether a model runs at all, tried without data on the meta device, where shapes are computed and values are not.

Inputs are guessed from the model. What the dense model does not accept proves nothing of the pruned one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.files import BROKEN
from pruningawaretraining.models.calling import evaluating, first_line, same_generators, unwrap

Conv = nn.modules.conv._ConvNd
SIDES = {1: (64, 1024), 2: (32, 224, 64, 28), 3: (16, 32)}
"""Dimensions of a convolution -> sides of the inputs that are tried."""


class Trial:
    """A model's forward pass on guessed inputs, tried now, so that it can be tried again after a change.

    Args:
        model: as it is before the change. Nothing of it is changed or computed; models with forward hooks, which would
            be called, are not tried.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model)
        hooked = any(one._forward_hooks or one._forward_pre_hooks for one in self.model.modules())
        guesses = [] if hooked else list(_guesses(self.model))
        self._guess = next((number for number, one in enumerate(guesses) if self._failure(one) is None), None)
        self._before = None if self._guess is None else guesses[self._guess]

    @property
    def inputs(self) -> Tensor | None:
        """The inputs that the model took, as wide as its first layer is now; None if it took none."""
        return None if self._guess is None else list(_guesses(self.model))[self._guess]

    def failure(self) -> str | None:
        """Why the model does not run any more; None if it does, or if it was never known to run."""
        inputs = self.inputs
        failure = None if inputs is None else self._failure(inputs)
        if failure is not None and self._before is not None:  # the first layer may not be the one that reads them
            return None if self._failure(self._before) is None else failure
        return failure

    def _failure(self, inputs: Tensor) -> str | None:
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        state = {name: tensor.detach().to("meta") for name, tensor in named}
        try:
            with torch.no_grad(), evaluating(self.model), same_generators(self.model):
                torch.func.functional_call(self.model, state, (inputs,))
        except BROKEN as error:
            return first_line(error)
        return None


def _guesses(model: nn.Module) -> Iterator[Tensor]:
    """Inputs that the first layer with weights may be meant for."""
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
