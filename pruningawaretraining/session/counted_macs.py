"""MACs of a model whose widths stay, counted once."""

from __future__ import annotations

from typing import Any

from torch import nn

from pruningawaretraining.costs.macs import macs_per_layer
from pruningawaretraining.models.calling import ForwardFn
from pruningawaretraining.models.trees import tensors_of


class CountedMacs:
    """MACs of the modules of a model whose widths stay: it is run once, and again when its modules are others."""

    def __init__(self) -> None:
        self._counted_of: Any = None
        self._macs: dict[str, int] = {}

    def per_layer(self, model: nn.Module, inputs: Any, forward_fn: ForwardFn | None) -> dict[str, int]:
        """As :func:`~pruningawaretraining.costs.macs.macs_per_layer`; nothing is known without inputs."""
        if inputs is None:
            return {}
        kinds = [(name, type(module).__name__) for name, module in model.named_modules()]
        shapes = [tuple(one.shape) for one in (*model.parameters(), *tensors_of(inputs))]
        if self._counted_of != (kinds, shapes):
            self._macs = macs_per_layer(model, inputs, forward_fn)
            self._counted_of = kinds, shapes
        return self._macs
