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

from pruningawaretraining.distributed.collectives import totals, world_size
from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.models.calling import in_backward, is_probing


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

    @classmethod
    def none(cls, width: int, device: torch.device) -> Moments:
        """Of nothing seen yet."""
        return cls(*(torch.zeros(shape, device=device) for shape in ((), (width,), (width,))))

    def add(self, values_NF: Tensor, momentum: float) -> None:
        """Add a batch in place (Chan et al. 1983); ``momentum`` below 1 lets earlier batches fade."""
        values_NF = values_NF.float()
        fresh_F = values_NF.mean(0)
        fresh_spread_F = (values_NF - fresh_F).square().sum(0)
        earlier = self.count * momentum
        total = earlier + values_NF.shape[0]
        delta_F = fresh_F - self.mean_F
        self.spread_F.mul_(momentum).add_(fresh_spread_F)
        self.spread_F.add_(delta_F.square() * (earlier * values_NF.shape[0] / total))
        self.mean_F.add_(delta_F * (values_NF.shape[0] / total))
        self.count.copy_(total)

    def with_others(self, other: Moments) -> Moments:
        """The moments of both together."""
        total = self.count + other.count
        share = other.count / total.clamp(min=1e-30)
        delta_F = other.mean_F - self.mean_F
        spread_F = self.spread_F + other.spread_F + delta_F.square() * (self.count * share)
        return Moments(total, self.mean_F + delta_F * share, spread_F)

    def faded(self, factor: float) -> Moments:
        """The same moments, counting less."""
        return Moments(self.count * factor, self.mean_F, self.spread_F * factor)

    def to(self, device: torch.device) -> Moments:
        return Moments(self.count.to(device), self.mean_F.to(device), self.spread_F.to(device))

    @property
    def variance_F(self) -> Tensor:
        return self.spread_F / self.count.clamp(min=1)

    @property
    def squares_F(self) -> Tensor:
        """The sum of squares of each feature."""
        return self.spread_F + self.count * self.mean_F.square()


class InputHook:
    """Forward pre-hook that hands a layer's input on; a copy or a saved model keeps one that does nothing."""

    def __init__(self, see: Callable[[nn.Module, Tensor], None] | None = None) -> None:
        self.see = see

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.see is not None and inputs and isinstance(inputs[0], Tensor) and not in_backward():
            self.see(module, inputs[0])

    def __reduce__(self) -> tuple[type[InputHook], tuple[()]]:
        return InputHook, ()


class ActivationCollector:
    """Moments of the inputs of every layer whose weight is in the grouping.

    With several processes each sees its own part of a batch. Their moments are combined at events, and from
    then on known to all; what each has seen since then is kept apart until the next.

    Args:
        momentum: how much earlier batches still count at the next; 1 for all alike.
        in_eval: listen in eval mode too (calibration), not only while training.
    """

    def __init__(self, momentum: float = 1.0, in_eval: bool = True) -> None:
        self.momentum, self.in_eval = momentum, in_eval
        self.moments: dict[str, Moments] = {}  # of this process, since the last event
        self.common: dict[str, Moments] = {}  # of all processes, up to then
        self.batches: dict[str, int] = {}  # of this process, since then
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
            hook = InputHook(partial(self._see, name))
            self._handles.append(layer.register_forward_pre_hook(hook))

    def detach(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def _see(self, name: str, module: nn.Module, x: Tensor) -> None:
        if not (module.training or self.in_eval) or x.numel() == 0 or is_probing():
            return
        dim = -1 if isinstance(module, nn.Linear) else x.dim() - len(module.kernel_size) - 1  # type: ignore[arg-type]
        values_NF = x.detach().movedim(dim, -1).reshape(-1, x.shape[dim])
        known = self.moments.get(name)
        if known is None or known.mean_F.device != x.device:
            width = values_NF.shape[1]
            known = Moments.none(width, x.device) if known is None else known.to(x.device)
            self.moments[name] = known
        known.add(values_NF, self.momentum)
        self.batches[name] = self.batches.get(name, 0) + 1

    def agree(self) -> None:
        """See :class:`~pruningawaretraining.criteria.base.Collector`: one all-reduce of three numbers a feature."""
        if world_size() == 1 or not self._layers:
            return
        rows = [self._sums(name, layer) for name, layer in self._layers.items()]
        for (name, layer), row in zip(self._layers.items(), totals(rows), strict=True):
            count, batches = row[0], int(row[1])
            if batches == 0:
                continue
            mean_F, square_F = row[2:].view(2, -1) / count.clamp(min=1e-30)
            spread_F = (square_F - mean_F.square()).clamp(min=0) * count
            seen = Moments(*(one.float() for one in (count, mean_F, spread_F))).to(layer.weight.device)  # type: ignore[arg-type, union-attr]
            known = self.common.get(name)
            if known is not None:
                fade = self.momentum ** (batches / world_size())
                seen = known.to(seen.mean_F.device).faded(fade).with_others(seen)
            self.common[name] = seen
        self.moments, self.batches = {}, {}

    def _sums(self, name: str, layer: nn.Module) -> Tensor:
        """Count, batches, sums and sums of squares of what this process has seen of a layer, in one row."""
        own = self.moments.get(name)
        if own is None:
            return torch.zeros(2 + 2 * _features(layer), dtype=torch.float64)
        count, mean_F, spread_F = (one.double().cpu() for one in (own.count, own.mean_F, own.spread_F))
        head = torch.stack([count, torch.tensor(float(self.batches.get(name, 0)), dtype=torch.float64)])
        return torch.cat([head, count * mean_F, spread_F + count * mean_F.square()])

    def _all(self) -> dict[str, Moments]:
        """Moments of every layer."""
        found = dict(self.common)
        for name, own in self.moments.items():
            known = found.get(name)
            if known is not None:
                known = known.to(own.mean_F.device).faded(self.momentum ** self.batches.get(name, 0))
            found[name] = own if known is None else known.with_others(own)
        return found

    def on_before_step(self, grouping: Grouping, scale: Tensor | float = 1.0) -> None:
        """Nothing to read before a step."""

    def tensors(self) -> dict[str, Tensor]:
        """``input_squares.NAME`` and ``input_variance.NAME`` by parameter, each in a shape that broadcasts to it, and
        ``row_dim.NAME``, the dimension of its output channels."""
        out: dict[str, Tensor] = {}
        for name, moments in self._all().items():
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
        self.moments, self.common, self.batches = {}, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data: of all processes up to the last event, and of this one since then."""
        return {
            name: [moments.count.clone(), moments.mean_F.clone(), moments.spread_F.clone()]
            for name, moments in self._all().items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~pruningawaretraining.criteria.base.Collector`."""
        unknown = sorted(set(state) - set(self._layers))
        if unknown and self._layers:
            raise CheckpointError(f"state: activations of {unknown[0]!r}, which is not a layer of the grouping")
        loaded = {name: Moments(*(tensor.clone() for tensor in values)) for name, values in state.items()}
        alone = world_size() == 1
        self.moments, self.common, self.batches = loaded if alone else {}, {} if alone else loaded, {}


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))


def _features(layer: nn.Module) -> int:
    """How many input features a layer has."""
    found = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    assert isinstance(found, int)
    return found


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
