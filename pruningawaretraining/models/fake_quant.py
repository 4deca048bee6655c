"""Fake quantization: scales follow the channels of their weights; disabled while a removal is checked.

Shape suffixes: ``_O`` outputs of a layer.

Nothing is imported from a quantization library. A fake quantizer is known by what it has: ``fake_quant_enabled`` and
``observer_enabled`` (PyTorch's, and those of torchao's quantizers for exported graphs), or by its name and ``enabled``
(torchao's for linear layers).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.errors import ModelError
from pruningawaretraining.models.surgery import Keep, Surgery, slice_tensor, successor

SCALES = ("scale", "zero_point", "min_val", "max_val")
"""Tensors of fake quantizers and of their observers, with one entry for each channel where they have several."""
WEIGHT_QUANTIZERS = ("weight_fake_quantizer", "weight_fake_quant")
"""Where a layer keeps the fake quantizer of its weight."""

Exchanged = dict[Tensor, tuple[nn.Parameter, Keep]]


def is_converted(tensor: Tensor) -> bool:
    """Whether a tensor holds integers already, in torchao's or PyTorch's form: it cannot be trained or sliced."""
    return tensor.is_quantized or type(tensor).__module__.startswith("torchao.")


def is_observing(module: nn.Module) -> bool:
    """Whether a module is an observer or a fake quantizer of PyTorch's kind: it says which scale it has come to."""
    return hasattr(module, "calculate_qparams")


def _is_switched(module: nn.Module) -> bool:
    """Whether a module is a fake quantizer of torchao's kind, switched by a plain attribute."""
    return isinstance(getattr(module, "enabled", None), bool) and "FakeQuantizer" in type(module).__name__


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """Disable fake quantizers and observers inside the block."""
    switches = [module for module in model.modules() if _is_switched(module) and module.enabled]
    buffers = [
        buffer
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[2] in ("fake_quant_enabled", "observer_enabled")
    ]
    before = [buffer.clone() for buffer in buffers]
    try:
        for module in switches:
            module.enabled = False  # type: ignore[assignment]
        for buffer in buffers:
            buffer.zero_()
        yield
    finally:
        for module in switches:
            module.enabled = True  # type: ignore[assignment]
        for buffer, values in zip(buffers, before, strict=True):
            buffer.copy_(values)


def folded_norms(model: nn.Module) -> frozenset[str]:
    """Weights of norms that PyTorch's fused layers fold into themselves in training, and divide by: they must not be 0,
    and need not be, since everything else of a masked channel is."""
    return frozenset(
        f"{name}.bn.weight" if name else "bn.weight"
        for name, module in model.named_modules()
        if hasattr(module, WEIGHT_QUANTIZERS[1]) and getattr(getattr(module, "bn", None), "weight", None) is not None
    )


def follow_weights(model: nn.Module, kept: Mapping[str, Keep], surgery: Surgery) -> Exchanged:
    """Slice what the fake quantizers of a model's layers know of each channel, as the weights have been sliced.

    Args:
        model: with sliced weights.
        kept: name of a tensor -> dimension -> indices that stay.
        surgery: remembers how to undo it.

    Returns:
        Old scale -> (new one, what was kept), of scales that are learned.

    Raises:
        ModelError: input columns are quantized in groups that no longer divide them.
    """
    exchanged: Exchanged = {}
    for name, module in model.named_modules():
        keep = kept.get(f"{name}.weight" if name else "weight")
        quantizer = next(
            (found for one in WEIGHT_QUANTIZERS if (found := getattr(module, one, None)) is not None), None
        )
        if keep is None or not isinstance(quantizer, nn.Module):
            continue
        if is_observing(quantizer):
            follow_weight(quantizer, keep, surgery)
        else:
            exchanged.update(_slice_groups(name, module, quantizer, keep, surgery))
    return exchanged


def follow_weight(quantizer: nn.Module, keep: Keep, surgery: Surgery) -> None:
    """Slice what a fake quantizer of PyTorch's kind, and its observer, know of each channel of one weight.

    Args:
        quantizer: the fake quantizer.
        keep: of the weight: dimension -> indices that stay.
        surgery: remembers how to undo it.
    """
    for module in quantizer.modules():
        axis = getattr(module, "ch_axis", getattr(quantizer, "ch_axis", -1))
        if axis not in keep:
            continue
        for attribute in SCALES:
            value_O = getattr(module, attribute, None)
            if isinstance(value_O, Tensor) and value_O.dim() == 1 and value_O.numel() > 1:
                surgery.set_attribute(module, attribute, _sliced(value_O, {0: keep[axis]}))


def _sliced(value: Tensor, keep: Keep) -> Tensor:
    new = slice_tensor(value.detach(), keep)
    return successor(value, new) if isinstance(value, nn.Parameter) else new


def _slice_groups(name: str, layer: nn.Module, quantizer: nn.Module, keep: Keep, surgery: Surgery) -> Exchanged:
    """Scales of torchao's kind: one for each output, or for each output and group of consecutive input columns."""
    config: Any = getattr(quantizer, "config", None)
    size = _group_size(config)
    inputs = int(layer.weight.shape[1])  # type: ignore[union-attr,index,misc]
    learned = isinstance(getattr(quantizer, "scale", None), nn.Parameter)
    fixed = learned or getattr(config, "is_dynamic", True) is False
    if size is not None and 1 in keep and (fixed or inputs % size):
        why = "its scales are fixed for groups" if fixed else f"{inputs} inputs are left for groups"
        raise ModelError(
            f"{name}: {why} of {size} input columns, which the removal would tear apart. Allowed: scales by output "
            f"(PerAxis(0)), {'removal before it is prepared' if fixed else f'multiple: {size} in the rule'}, or exclude"
        )
    exchanged: Exchanged = {}
    for attribute in ("scale", "zero_point"):
        value = getattr(quantizer, attribute, None)
        if 0 not in keep or not isinstance(value, Tensor) or value.dim() == 0 or len(value) <= int(keep[0].max()):
            continue
        new = _sliced(value, {0: keep[0]})
        surgery.set_attribute(quantizer, attribute, new)
        if isinstance(value, nn.Parameter) and isinstance(new, nn.Parameter):
            exchanged[value] = (new, {0: keep[0]})
    return exchanged


def _group_size(config: Any) -> int | None:
    """How many consecutive input columns share a scale; None where an output has one scale."""
    values = getattr(config, "__dict__", {})
    sizes = (values.get("group_size"), values.get("block_size"), getattr(values.get("granularity"), "group_size", None))
    return next((size for size in sizes if isinstance(size, int)), None)


@torch.no_grad()
def without_zero(model: nn.Module) -> list[str]:
    """Layers whose fake quantizer makes something else of a weight that is 0, so that masks do not hold behind it.

    Those are schemes with a fractional zero point; only quantizers of torchao's kind have them.
    """
    found = []
    for name, module in model.named_modules():
        quantizer, weight = getattr(module, WEIGHT_QUANTIZERS[0], None), getattr(module, "weight", None)
        if not isinstance(quantizer, nn.Module) or not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        probe = weight.detach().clone()
        probe[:, ::2] = 0
        if _is_switched(quantizer) and bool((quantizer(probe)[:, ::2] != 0).any()):
            found.append(name)
    return found
