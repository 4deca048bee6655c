"""Norms over masked channels: statistics over the kept ones, as in the removed model.

Shape suffixes: ``_C`` channels, ``_GC`` channels in groups of a norm, ``_B`` batch, ``_P`` positions, ``_G`` groups
of coupled channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.models.kept_hooks import KeptHooks
from pruningawaretraining.models.kept_norm import KeptNorm
from pruningawaretraining.models.masked_filters import KeptFilters, computes_filters
from pruningawaretraining.models.masked_modules import KeptModule, may_run_twice
from pruningawaretraining.models.surgery import Surgery

__all__ = ["KeptNorm", "NormHooks", "is_foreign_rms_norm", "kept_norm_of", "set_norm_width"]


def _standardised(x: Tensor, keep: Tensor, dims: list[int], count: Tensor, eps: float) -> Tensor:
    """``(x - mean) / sqrt(variance + eps)`` over the kept entries, 0 elsewhere; ``count`` is how many they are."""
    centred = (x - (x * keep).sum(dim=dims, keepdim=True) / count) * keep
    return centred * torch.rsqrt(centred.square().sum(dim=dims, keepdim=True) / count + eps)


def _scaled(x: Tensor, module: nn.LayerNorm | nn.GroupNorm, shape: Sequence[int], keep: Tensor) -> Tensor:
    for parameter, apply in ((module.weight, torch.mul), (module.bias, torch.add)):
        if parameter is not None:
            x = apply(x, parameter.to(x.dtype).view(shape))
    return x * keep


def _at_least_float(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


class KeptLayerNorm(KeptNorm):
    """A LayerNorm over the kept channels only; see :class:`KeptNorm`."""

    def __init__(self, module: nn.LayerNorm, device: torch.device) -> None:
        super().__init__(module.normalized_shape[-1], device)
        self.axis = -1 if type(module).forward is nn.LayerNorm.forward else None

    def __call__(self, module: nn.LayerNorm, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = _at_least_float(inputs[0])
        if self.axis is None:
            self.axis = _normalised_axis(module, inputs[0], output)
        shape = [1] * x.dim()
        shape[self.axis] = -1
        keep = self._keep(x).to(x.dtype).view(shape)
        normal = _standardised(x, keep, [self.axis], keep.sum().clamp(min=1), module.eps)
        return _scaled(normal, module, shape, keep).to(output.dtype)


def _normalised_axis(module: nn.LayerNorm, x: Tensor, output: Tensor) -> int:
    """The axis that a LayerNorm (or a subclass for images, channels first) normalises."""
    width = module.normalized_shape[-1]
    candidates = [axis for axis in (-1, 1) if x.shape[axis] == width]
    if len(candidates) == 1:
        return candidates[0]
    with torch.no_grad():
        normed = [
            functional.layer_norm(
                x.movedim(axis, -1), module.normalized_shape, module.weight, module.bias, module.eps
            ).movedim(-1, axis)
            for axis in candidates
        ]
        gaps = [float((one - output).abs().max()) for one in normed]
        return candidates[gaps.index(min(gaps))]


class KeptRMSNorm(KeptNorm):
    """An RMSNorm over the kept channels only; see :class:`KeptNorm`."""

    def __init__(self, module: nn.RMSNorm, device: torch.device) -> None:
        super().__init__(module.normalized_shape[-1], device)

    def __call__(self, module: nn.RMSNorm, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = _at_least_float(inputs[0])
        keep = self._keep(x).to(x.dtype)
        eps = torch.finfo(inputs[0].dtype).eps if module.eps is None else module.eps
        x = x * keep
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) / keep.sum().clamp(min=1) + eps)
        return (x if module.weight is None else x * module.weight.to(x.dtype)).to(output.dtype)


class KeptGroupNorm(KeptNorm):
    """A GroupNorm over the kept channels only (equally many in every group); see :class:`KeptNorm`."""

    def __init__(self, module: nn.GroupNorm, device: torch.device) -> None:
        super().__init__(module.num_channels, device)

    def __call__(self, module: nn.GroupNorm, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = _at_least_float(inputs[0])
        keep_C = self._keep(x).to(x.dtype)
        x_BGCP = x.reshape(len(x), module.num_groups, x.shape[1] // module.num_groups, -1)
        keep_GC = keep_C.view(1, module.num_groups, -1, 1)
        count = keep_GC.sum(2, keepdim=True) * x_BGCP.shape[3]
        normal = _standardised(x_BGCP, keep_GC, [2, 3], count, module.eps).reshape(x.shape)
        shape = [1, -1] + [1] * (x.dim() - 2)
        return _scaled(normal, module, shape, keep_C.view(shape)).to(output.dtype)


class KeptForeignRMSNorm(KeptNorm):
    """An RMSNorm that is not PyTorch's own (transformers, timm): its output, corrected for the channels that are left.

    With ``n`` channels of which ``k`` are kept and the others 0, ``x / sqrt(sum x^2 / n + eps)`` becomes
    ``x / sqrt(sum x^2 / k + eps)``, whatever the module multiplies it with.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        super().__init__(len(weight), device)
        names = ("variance_epsilon", "eps", "norm_eps", "epsilon")
        self.eps = next((float(value) for name in names if isinstance(value := getattr(module, name, None), float)), 0)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = _at_least_float(inputs[0])
        keep = self._keep(x).to(x.dtype)
        squares = (x * keep).square().sum(-1, keepdim=True)
        ratio = (x.square().mean(-1, keepdim=True) + self.eps) / (squares / keep.sum().clamp(min=1) + self.eps)
        return (output * ratio.sqrt() * keep).to(output.dtype)


def is_foreign_rms_norm(module: object) -> bool:
    """Whether a module is an RMSNorm over the last dimension that is not PyTorch's own."""
    name = type(module).__name__.lower()
    weight = getattr(module, "weight", None)
    named = name.endswith("rmsnorm") or name == "t5layernorm"
    return named and not isinstance(module, nn.RMSNorm) and isinstance(weight, Tensor) and weight.dim() == 1


KeptNormOf = Callable[[Any, torch.device], KeptNorm]
KEPT_NORMS: dict[type[nn.Module], KeptNormOf] = {
    nn.LayerNorm: KeptLayerNorm,
    nn.RMSNorm: KeptRMSNorm,
    nn.GroupNorm: KeptGroupNorm,
}


def kept_norm_of(module: nn.Module) -> KeptNormOf | None:
    """The replacement of a module whose channels are masked; None if it does not mix channels, or if its code cannot be
    run on some of them alone."""
    if is_foreign_rms_norm(module):
        return KeptForeignRMSNorm
    if computes_filters(module):
        return KeptFilters
    known = next((hook for kind, hook in KEPT_NORMS.items() if isinstance(module, kind)), None)
    return KeptModule if known is None and may_run_twice(module) else known


class NormHooks(KeptHooks[KeptNorm]):
    """Norms that mix channels (LayerNorm, GroupNorm) compute their statistics over the kept channels.

    Nothing has to be compiled again for other masks.

    Args:
        model: the model.
        kept: masks -> norm layer -> which of its channels are kept.
    """

    def __init__(self, model: nn.Module, kept: Callable[[Tensor], Mapping[str, Tensor]]) -> None:
        super().__init__(model, partial(_of_mixing, model, kept))

    def hooked(self, name: str, keep_N: Tensor, device: torch.device) -> tuple[KeptNorm, RemovableHandle]:
        """Give a norm its hook."""
        module = self.model.get_submodule(name)
        make = kept_norm_of(module)
        assert make is not None
        hook = make(module, device)
        return hook, module.register_forward_hook(hook)


def _of_mixing(model: nn.Module, kept: Callable[[Tensor], Mapping[str, Tensor]], keep_G: Tensor) -> dict[str, Tensor]:
    """The masks of the norms that mix channels."""
    modules = dict(model.named_modules())
    return {name: keep_C for name, keep_C in kept(keep_G).items() if kept_norm_of(modules[name])}


def set_norm_width(module: nn.Module, width: int, surgery: Surgery) -> None:
    """Let a norm layer know how many channels it has."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or hasattr(module, "normalized_shape"):
        surgery.set_attribute(module, "normalized_shape", (width,))
    elif isinstance(module, nn.GroupNorm):
        surgery.set_attribute(module, "num_channels", width)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        surgery.set_attribute(module, "num_features", width)
