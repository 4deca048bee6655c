"""The Hessian of a layer's output error over its inputs, ``2/n X X'``: what SparseGPT prunes by.

Shape suffixes: ``_N`` positions (samples, pixels, tokens), ``_D`` inputs of one output (channels by kernel positions),
``_G`` groups of a grouped convolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining.criteria.second_order.fisher import workplace
from pruningawaretraining.distributed.collectives import totals, world_size
from pruningawaretraining.errors import ConfigError

FEW = 128
"""Positions whose product with themselves is worth its memory traffic."""


def check_supported(name: str, module: nn.Module) -> None:
    """Refuse layers whose inputs cannot be unfolded.

    Raises:
        ConfigError: it is neither linear nor a plain one- or two-dimensional convolution.
    """
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        raise ConfigError(
            f"criterion: input Hessians are not known for {name!r}, a {type(module).__name__}. Allowed: Linear, Conv1d "
            "and Conv2d; leave it out with 'exclude', or use obs, cap or fast_cap"
        )


def unfolded(module: nn.Module, inputs: Tensor) -> Tensor:
    """Inputs of each output position: (groups, positions, inputs), inputs channel by channel as in the weight."""
    if isinstance(module, nn.Linear):
        return inputs.reshape(1, -1, inputs.shape[-1])
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    one_dimensional = isinstance(module, nn.Conv1d)
    batched = inputs if inputs.dim() == module.weight.dim() else inputs[None]
    pad = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(batched, pad, mode=mode)
    padded = padded[:, :, None] if one_dimensional else padded
    lift = (1,) if one_dimensional else ()
    columns = functional.unfold(
        padded, (*lift, *module.kernel_size), dilation=(*lift, *module.dilation), stride=(*lift, *module.stride)
    )
    grouped = columns.reshape(columns.shape[0], module.groups, -1, columns.shape[-1])
    return grouped.permute(1, 0, 3, 2).reshape(module.groups, -1, grouped.shape[2])


def together(
    layers: Sequence[tuple[str, nn.Module]],
    sums: Mapping[str, Tensor],
    counts: Mapping[str, float],
    bias: bool,
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Sums and counts of all processes, of layers that any of them has seen; one flat all-reduce.

    Args:
        layers: (name, module), the same on every process.
        sums, counts: of this process: (groups, inputs, inputs), and over how many positions.
        bias: whether a constant input of 1 is among the inputs.
        dtype: of the sums.
    """
    rows = []
    for name, module in layers:
        weight = module.weight
        assert isinstance(weight, Tensor)
        width, groups = weight[0].numel() + bias, int(getattr(module, "groups", 1))  # type: ignore[arg-type]
        rows.append(sums.get(name, weight.new_zeros(groups, width, width, dtype=dtype)))
    seen = torch.tensor([counts.get(name, 0) for name, _ in layers], dtype=torch.float64)
    *rows, seen = totals([*rows, seen])
    found = {name: (row, float(count)) for (name, _), row, count in zip(layers, rows, seen, strict=True) if count}
    return {name: row for name, (row, _) in found.items()}, {name: count for name, (_, count) in found.items()}


class InputHessians:
    """Forward hooks that add up ``X X'`` for layers.

    Products of few positions are all memory traffic, and what they round to matters where inputs outnumber them. So
    few positions are kept until there are :data:`FEW`, and multiplied in float64; where one batch has as many, its
    product is made in float32, and added in float64.

    Args:
        layers: (name, module), each a linear layer or convolution.
        bias: append a constant input of 1, so that a bias is part of what is fitted.
    """

    def __init__(self, layers: Sequence[tuple[str, nn.Module]], bias: bool = False) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.bias = bias
        self._kept: dict[str, list[Tensor]] = {}
        self._handles = []
        for name, module in layers:
            check_supported(name, module)
            self._handles.append(module.register_forward_pre_hook(self._hook(name)))

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen_GND = unfolded(module, args[0].detach()).float()
            seen_GND = functional.pad(seen_GND, (0, 1), value=1.0) if self.bias else seen_GND
            groups, positions, width = seen_GND.shape
            device = workplace(seen_GND.device)
            if name not in self.sums:
                self.sums[name] = torch.zeros(groups, width, width, dtype=torch.float64, device=device)
            self.counts[name] = self.counts.get(name, 0) + positions
            if positions >= FEW:
                self.sums[name].add_((seen_GND.mT @ seen_GND).to(device))
                return
            kept = self._kept.setdefault(name, [])
            kept.append(seen_GND.to(device, torch.float64))  # a copy: the layer behind may overwrite its input
            if sum(one.shape[1] for one in kept) >= FEW:
                self._add_kept(name)

        return add

    def _add_kept(self, name: str) -> None:
        seen_GND = torch.cat(self._kept.pop(name), 1)
        self.sums[name].baddbmm_(seen_GND.mT, seen_GND)

    def agree(self, layers: Sequence[tuple[str, nn.Module]]) -> None:
        """Put together what all processes have seen of these layers; a collective."""
        if world_size() == 1:
            return
        self.sums, counts = together(layers, self.sums, self.counts, self.bias, torch.float64)
        self.counts = {name: int(count) for name, count in counts.items()}

    def remove(self) -> None:
        """Take the hooks out, and add what was kept."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for name in list(self._kept):
            self._add_kept(name)

    def hessian(self, name: str) -> Tensor:
        """``2/n X X'`` of a layer, (groups, inputs, inputs), float64.

        Raises:
            ConfigError: the layer was never run.
        """
        if name not in self.sums:
            raise ConfigError(f"criterion: the layer {name!r} saw no input; leave it out with 'exclude'")
        return self.sums[name] * (2.0 / self.counts[name])


def reordered(hessian_GDD: Tensor, kernel: int) -> Tensor:
    """From channel by channel to kernel position by kernel position, as :meth:`Layout.rows_of` orders columns."""
    groups, width, _ = hessian_GDD.shape
    order = torch.arange(width).reshape(width // kernel, kernel).mT.reshape(-1).to(hessian_GDD.device)
    return hessian_GDD[:, order][:, :, order]
