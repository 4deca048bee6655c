"""Collects the moments of layers' inputs while the model runs.

Shape suffixes: ``_F`` features (input channels) of a layer, ``_N`` everything else of an activation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.grouping import Grouping


@dataclass
class Moments:
    """Mean and spread of a layer's inputs by feature, over everything that it has seen.

    Args:
        count: values of each feature.
        mean_F: their mean.
        spread_F: the sum of squared distances from it.
    """

    count: Tensor
    mean_F: Tensor
    spread_F: Tensor

    def add(self, values_NF: Tensor, momentum: float) -> None:
        """Add a batch (Chan et al. 1983); ``momentum`` below 1 lets earlier batches fade."""
        values_NF = values_NF.float()
        fresh_F = values_NF.mean(0)
        fresh_spread_F = (values_NF - fresh_F).square().sum(0)
        earlier = self.count * momentum
        total = earlier + values_NF.shape[0]
        delta_F = fresh_F - self.mean_F
        self.spread_F = self.spread_F * momentum + fresh_spread_F
        self.spread_F = self.spread_F + delta_F.square() * (earlier * values_NF.shape[0] / total)
        self.mean_F = self.mean_F + delta_F * (values_NF.shape[0] / total)
        self.count = total

    @property
    def variance_F(self) -> Tensor:
        return self.spread_F / self.count.clamp(min=1)

    @property
    def squares_F(self) -> Tensor:
        """The sum of squares of each feature."""
        return self.spread_F + self.count * self.mean_F.square()


class _InputHook:
    """Forward pre-hook that hands a layer's input on; a copy or a saved model keeps one that does nothing."""

    def __init__(self, see: Callable[[nn.Module, Tensor], None] | None = None) -> None:
        self.see = see

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.see is not None and inputs and isinstance(inputs[0], Tensor):
            self.see(module, inputs[0])

    def __reduce__(self) -> tuple[type[_InputHook], tuple[()]]:
        return _InputHook, ()


class ActivationCollector:
    """Moments of the inputs of every layer whose weight is in the grouping.

    Args:
        momentum: how much earlier batches still count at the next; 1 for all alike.
        in_eval: listen in eval mode too (calibration), not only while training.
    """

    def __init__(self, momentum: float = 1.0, in_eval: bool = True) -> None:
        self.momentum, self.in_eval = momentum, in_eval
        self.moments: dict[str, Moments] = {}
        self._layers: dict[str, nn.Module] = {}
        self._parameters: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module, grouping: Grouping) -> None:
        """Put a forward pre-hook on every layer."""
        self.detach()
        layers = {name: module for name, module in model.named_modules() if _is_layer(module)}
        self._layers = {
            name: layers[name]
            for name in dict.fromkeys(member.name.rpartition(".")[0] for member in grouping.members)
            if name in layers
        }
        for name, layer in self._layers.items():
            hook = _InputHook(partial(self._see, name))
            self._handles.append(layer.register_forward_pre_hook(hook))

    def detach(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def _see(self, name: str, module: nn.Module, x: Tensor) -> None:
        if not (module.training or self.in_eval) or x.numel() == 0:
            return
        dim = -1 if isinstance(module, nn.Linear) else x.dim() - len(module.kernel_size) - 1  # type: ignore[arg-type]
        values_NF = x.detach().movedim(dim, -1).reshape(-1, x.shape[dim])
        known = self.moments.get(name)
        if known is None or known.mean_F.device != x.device:
            zeros_F = torch.zeros(values_NF.shape[1], device=x.device)
            known = known or Moments(torch.zeros(()), zeros_F, zeros_F)
            known = Moments(*(tensor.to(x.device) for tensor in (known.count, known.mean_F, known.spread_F)))
            self.moments[name] = known
        known.add(values_NF, self.momentum)

    def on_before_step(self, grouping: Grouping, scale: Tensor | float = 1.0) -> None:
        """Nothing to read before a step."""

    def tensors(self) -> dict[str, Tensor]:
        """``input_squares.NAME`` and ``input_variance.NAME`` by parameter, each in a shape that broadcasts to it, and
        ``row_dim.NAME``, the dimension of its output channels."""
        out: dict[str, Tensor] = {}
        for name, moments in self.moments.items():
            layer = self._layers.get(name)
            if layer is None:
                continue
            key = f"{name}.weight" if name else "weight"
            out[f"input_squares.{key}"] = along_inputs(layer, moments.squares_F)
            out[f"input_variance.{key}"] = along_inputs(layer, moments.variance_F)
            out[f"row_dim.{key}"] = torch.tensor(int(getattr(layer, "transposed", False)))
        return out

    def restrict(self, grouping: Grouping, keep_G: Tensor) -> None:
        """The layers have other inputs now: begin anew."""
        self.moments = {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data."""
        return {
            name: [moments.count.clone(), moments.mean_F.clone(), moments.spread_F.clone()]
            for name, moments in self.moments.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~pruningawaretraining.statistics.Collector`."""
        unknown = sorted(set(state) - set(self._layers))
        if unknown and self._layers:
            raise CheckpointError(f"state: activations of {unknown[0]!r}, which is no layer of the grouping")
        self.moments = {name: Moments(*(tensor.clone() for tensor in values)) for name, values in state.items()}


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))


def along_inputs(layer: nn.Module, values_F: Tensor) -> Tensor:
    """One value for each input feature of a layer, in a shape that broadcasts to its weight."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    ones = [1] * (weight.dim() - 2)
    if getattr(layer, "transposed", False):
        return values_F.view(-1, 1, *ones)
    groups = int(getattr(layer, "groups", 1))  # type: ignore[arg-type]
    if groups == 1:
        return values_F.view(1, -1, *ones)
    by_group = values_F.view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    return by_group.view(weight.shape[0], weight.shape[1], *ones)
