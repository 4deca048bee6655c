"""Modules that mix channels in ways of their own, while some channels are masked: run on the kept channels alone.

Shape suffixes: ``_C`` channels, ``_K`` kept channels.

A norm written by hand, a global response norm, a pixel norm: whatever such a module computes, masked it has to compute
what it will once the channels are gone. So a forward hook runs its code again, on the kept channels of its input and of
its tensors, and puts the result in their places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.models.kept_norm import KeptNorm
from pruningawaretraining.models.module_widths import narrowed, widths_of
from pruningawaretraining.models.surgery import Surgery

_MAKERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear)
_BARRED = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.Embedding,
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
)


def may_run_twice(module: nn.Module) -> bool:
    """Whether a module makes no channels itself, and nothing in it counts or draws; layers in it are not to read the
    channels that it mixes."""
    makes = isinstance(module, _MAKERS) or hasattr(module, "nf")
    return not makes and not any(isinstance(one, _BARRED) for one in module.modules())


class KeptChannels:
    """Which channels are kept, along one dimension counted from the end."""

    def __init__(self) -> None:
        self.keep_C: Tensor | None = None
        self.kept_K = torch.zeros(0, dtype=torch.int64)
        self.channels, self.axis = 0, -1

    def copy_(self, keep: Tensor) -> None:
        """Take new ones: True for kept, of shape (channels, 1, ...) with a 1 for every dimension behind."""
        self.keep_C = keep.detach().cpu().reshape(-1).bool()
        self.kept_K = torch.nonzero(self.keep_C).flatten()
        self.channels, self.axis = len(self.keep_C), -keep.dim()

    @property
    def all(self) -> bool:
        """Whether nothing is masked."""
        return len(self.kept_K) == self.channels

    def on(self, device: torch.device) -> Tensor:
        """The kept indices; copied to a device once after every change."""
        if self.kept_K.device != device:
            self.kept_K = self.kept_K.to(device)
        return self.kept_K


class KeptModule(KeptNorm):
    """Forward hook: what a module computes of the kept channels alone, and 0 elsewhere.

    Args:
        module: the module; see :func:`may_run_twice`.
        device: where it is.
    """

    keep_C: Any

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__(1, device)
        self.keep_C = KeptChannels()

    @property
    def behind(self) -> int:  # type: ignore[override]
        return -int(self.keep_C.axis) - 1

    def known(self) -> Tensor | None:
        """Which channels are kept; None before it was told."""
        found: Tensor | None = self.keep_C.keep_C
        return found

    def narrow(self, keep_C: Tensor, surgery: Surgery) -> None:
        """Know of these channels alone."""
        left = KeptChannels()
        left.copy_(self.keep_C.keep_C[keep_C].reshape(-1, *[1] * self.behind))
        surgery.set_attribute(self, "keep_C", left)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        keep: KeptChannels = self.keep_C
        if keep.all or not isinstance(output, Tensor):
            return output
        has_channels = output.dim() >= -keep.axis and output.shape[keep.axis] == keep.channels
        small = _with_kept(module, keep)
        found = small.forward(*(_kept(one, keep) for one in inputs))
        if not has_channels or found.dim() < -keep.axis or found.shape[keep.axis] != len(keep.kept_K):
            return found
        index = keep.on(found.device)
        return torch.zeros_like(output, dtype=found.dtype).index_copy(found.dim() + keep.axis, index, found)


def _with_kept(module: nn.Module, keep: KeptChannels) -> nn.Module:
    """A module of the same code whose tensors and widths are those of the kept channels; it shares all else."""
    small = type(module).__new__(type(module))
    own = vars(small)
    own.update(vars(module))
    own.update(_parameters={}, _buffers={})
    for name, one in {**module._parameters, **module._buffers}.items():
        own[name] = None if one is None else _sliced(one, keep)
    for name, value in widths_of(module, keep.channels):
        own[name] = narrowed(value, len(keep.kept_K))
    return small


def _sliced(tensor: Tensor, keep: KeptChannels) -> Tensor:
    for dim, size in enumerate(tensor.shape):
        if size == keep.channels:
            tensor = tensor.index_select(dim, keep.on(tensor.device))
    return tensor


def _kept(value: Any, keep: KeptChannels) -> Any:
    """The kept channels of an input; what has no channels there passes."""
    if not isinstance(value, Tensor) or value.dim() < -keep.axis or value.shape[keep.axis] != keep.channels:
        return value
    return value.index_select(value.dim() + keep.axis, keep.on(value.device))
