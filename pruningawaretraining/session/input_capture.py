"""Example inputs: given, or those of the model's first forward pass."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.models.calling import outside_inference
from pruningawaretraining.models.example_inputs import Example, as_inputs, one_example, without_labels
from pruningawaretraining.models.trees import map_tensors, tensors_of

logger = logging.getLogger(__name__)


class InputCapture:
    """Holds the example inputs of a model, or waits for some.

    Args:
        model: the model.
        inputs: example inputs, or None.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model = model
        self._handle: RemovableHandle | None = None
        self._told = False
        self.captured = False  # whether the model itself is to show the inputs, or has shown them
        self.set(inputs)

    @property
    def inputs(self) -> Any:
        """The example inputs, or None until the model has shown some."""
        return self._example.inputs

    def set(self, inputs: Any) -> None:
        """Take other inputs; those that were made in inference mode as copies, which training can use."""
        with outside_inference():
            inputs = map_tensors(lambda one: one.clone() if one.is_inference() else one, inputs)
            self._example = Example(inputs, self.model)

    def watch(self) -> None:
        """Remember one example of the inputs of the next forward pass."""
        if self._handle is None:
            self.captured = True
            self._handle = self.model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.inputs is not None or not any(True for _ in tensors_of((args, kwargs))):
            return
        inputs = without_labels(module, as_inputs(module, args, kwargs))
        if inputs is None:
            self._tell()
        else:
            self.set(one_example(inputs))
            if self._handle is not None:
                self._handle.remove()

    def _tell(self) -> None:
        if not self._told:
            logger.warning(
                "example_inputs: the %s is called with a training batch, labels and all, and would give a loss; no "
                "channel is pruned until it is called with inputs alone. Allowed: example_inputs=",
                type(self.model).__name__,
            )
        self._told = True
