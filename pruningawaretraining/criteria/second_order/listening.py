"""Listens to training for criteria that need the moments of layers' inputs.

Shape suffixes: ``_G`` groups of a convolution (one), ``_N`` positions, ``_X`` a layer's inputs (channels by kernel
positions) and a constant 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.criteria.input_moments import InputHook
from pruningawaretraining.criteria.second_order.channels import losing_readers
from pruningawaretraining.criteria.second_order.layer_inputs import together, unfolded
from pruningawaretraining.distributed.collectives import world_size
from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.models.calling import is_probing

MOMENTS = "input_moments"
EVERY, FADE = 16, 0.9
"""One batch in so many is looked at, and how much earlier ones still count then: it costs about as much as a forward
pass, divided by that."""


class InputMomentsCollector:
    """Means of ``x x'`` over the inputs of layers that read channels, a constant 1 among them, while the model trains.

    With several processes each sees its own part of a batch; they put together what they have seen at events.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}
        self.batches: dict[str, int] = {}
        self._layers: dict[str, nn.Module] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module, grouping: Grouping) -> None:
        """Put a forward pre-hook on every layer that reads a channel of these groups."""
        self.detach()
        found = losing_readers(model, grouping, torch.zeros(grouping.size, dtype=torch.bool))
        self._layers = {reader.name: reader.module for reader in found}
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(InputHook(partial(self._see, name))))

    def detach(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def _see(self, name: str, module: nn.Module, x: Tensor) -> None:
        if not module.training or x.numel() == 0 or is_probing():
            return
        number = self.batches.get(name, 0)
        self.batches[name] = number + 1
        if number % EVERY:
            return
        seen_GNX = functional.pad(unfolded(module, x.detach()).float(), (0, 1), value=1.0)
        square_GXX, count = seen_GNX.mT @ seen_GNX, float(seen_GNX.shape[1])
        known = self.sums.get(name)
        if known is not None:
            square_GXX = square_GXX.add_(known.to(square_GXX.device), alpha=FADE)
            count += FADE * self.counts[name]
        self.sums[name], self.counts[name] = square_GXX, count

    def agree(self) -> None:
        """See :class:`~pruningawaretraining.criteria.base.Collector`: one flat all-reduce of all moments."""
        if world_size() == 1 or not self._layers:
            return
        sums, counts = together(list(self._layers.items()), self.sums, self.counts, True, torch.float32)
        self.sums = {name: one / world_size() for name, one in sums.items()}
        self.counts = {name: one / world_size() for name, one in counts.items()}

    def on_before_step(self, grouping: Grouping, scale: Tensor | float = 1.0) -> None:
        """Nothing to read before a step."""

    def tensors(self) -> dict[str, Tensor]:
        """``input_moments.NAME`` by parameter: (inputs + 1, inputs + 1)."""
        return {f"{MOMENTS}.{name}.weight": sums[0] / self.counts[name] for name, sums in self.sums.items()}

    def restrict(self, grouping: Grouping, keep_G: Tensor) -> None:
        """The layers have other inputs now: begin anew."""
        self.sums, self.counts, self.batches = {}, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data."""
        return {
            name: [self.sums[name].clone(), self.counts[name], self.batches.get(name, 0)] for name in list(self.sums)
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~pruningawaretraining.criteria.base.Collector`."""
        unknown = sorted(set(state) - set(self._layers))
        if unknown and self._layers:
            raise CheckpointError(f"state: inputs of {unknown[0]!r}, which reads no channel of the grouping")
        self.sums = {name: values[0].clone() for name, values in state.items()}
        self.counts = {name: float(values[1]) for name, values in state.items()}
        self.batches = {name: int(values[2]) for name, values in state.items()}
