"""The properties that decide a layer's latency: kind, sizes and input shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.models import calling as inputs
from pruningawaretraining.runtimes import exporters
from pruningawaretraining.runtimes.runtime import Runtime

Point = tuple[int, int]
Timer = Callable[["LayerShape", Sequence[Point], Runtime, int], list[float]]


@dataclass(frozen=True)
class LayerShape:
    """A convolution or linear layer, and what goes through it.

    Attributes:
        kind: "conv", "depthwise" (one filter a channel), "linear", or "grouped" (any other convolution).
        outputs, inputs: dense widths.
        rows: the batch of a convolution; of a linear layer, everything before its last dimension.
        size: height and width (or as many as there are) of a convolution's input.
        kernel, stride, padding, dilation: of a convolution.
        groups: of a convolution.
        transposed: whether it is a transposed one.
        dtype: name of the weight's type.
    """

    kind: str
    outputs: int
    inputs: int
    rows: int
    size: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    dtype: str = "float32"

    def module(self, outputs: int, inputs_: int) -> nn.Module:
        """The layer at some widths."""
        if self.kind == "linear":
            return nn.Linear(inputs_, outputs, dtype=getattr(torch, self.dtype))
        kinds: list[Any] = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
        if self.transposed:
            kinds = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
        groups = inputs_ if self.kind == "depthwise" else self.groups
        widths, moves = (inputs_, outputs), (self.kernel, self.stride, self.padding)
        built: nn.Module = kinds[len(self.size) - 1](*widths, *moves, dilation=self.dilation, groups=groups)
        return built.to(getattr(torch, self.dtype))

    @property
    def positions(self) -> int:
        """Numbers that the layer writes for each channel."""
        if self.kind == "linear":
            return self.rows
        sides = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        if self.transposed:
            return self.rows * math.prod((n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in sides)
        return self.rows * math.prod((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)

    def input(self, width: int) -> Tensor:
        """Input at a width."""
        shape = (self.rows, width) if self.kind == "linear" else (self.rows, width, *self.size)
        return torch.full(shape, 0.5, dtype=getattr(torch, self.dtype))


def shape_of(module: nn.Module, given: Tensor) -> LayerShape | None:
    """The shape of a layer that was given this input, or None for other modules."""
    dtype = str(getattr(getattr(module, "weight", None), "dtype", torch.float32)).removeprefix("torch.")
    if isinstance(module, nn.Linear):
        rows = given.numel() // given.shape[-1]
        return LayerShape("linear", module.out_features, module.in_features, rows, dtype=dtype)
    if not isinstance(module, nn.modules.conv._ConvNd):
        return None
    padding = _padding(module)
    batched = given.dim() == len(module.kernel_size) + 2
    depthwise = module.groups == module.in_channels == module.out_channels and module.groups > 1
    plain = module.groups == 1 and not module.transposed
    return LayerShape(
        "depthwise" if depthwise and not module.transposed else "conv" if plain else "grouped",
        module.out_channels,
        module.in_channels,
        given.shape[0] if batched else 1,
        tuple(given.shape[2 if batched else 1 :]),
        tuple(module.kernel_size),
        tuple(module.stride),
        padding,
        tuple(module.dilation),
        module.groups,
        module.transposed,
        dtype,
    )


def _padding(module: nn.modules.conv._ConvNd) -> tuple[int, ...]:
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    if isinstance(module.padding, str):  # "same"
        return tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return tuple(int(one) for one in module.padding)


def layer_shapes(
    model: nn.Module, example_inputs: Any, layers: Sequence[str], forward_fn: inputs.ForwardFn | None = None
) -> dict[str, LayerShape]:
    """The shape of each layer by name, from one forward pass in eval mode; layers that are not reached are left out.

    Raises:
        ModelError: the model rejects the inputs.
    """
    found: dict[str, LayerShape] = {}

    def listener(name: str) -> Callable[[nn.Module, Any], None]:
        def hear(module: nn.Module, given: Any) -> None:
            shape = shape_of(module, given[0]) if given and isinstance(given[0], Tensor) else None
            if shape is not None:
                found[name] = shape

        return hear

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(listener(name)) for name in layers if name in modules]
    try:
        with torch.no_grad(), inputs.evaluating(model), exporters.without_attention_fastpath():
            inputs.checked_call(model, example_inputs, forward_fn)
    finally:
        for handle in handles:
            handle.remove()
    return found
