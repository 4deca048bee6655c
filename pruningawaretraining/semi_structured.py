"""2:4 weights as PyTorch's semi-structured sparse tensors: half the memory, and sparse matrix products on GPUs.

Shape suffixes: ``_OI`` the weight of a linear layer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pruningawaretraining.errors import ModelError, unknown

log = logging.getLogger(__name__)

CAPABILITY = (8, 0)
"""The first CUDA devices with sparse matrix products (Ampere)."""
DTYPES = (torch.float16, torch.bfloat16)
MULTIPLE = 64
"""What both dimensions of a weight have to be a multiple of, for every backend and type."""


def is_two_of_four(weight_OI: Tensor) -> bool:
    """Whether at most 2 of every 4 weights that follow each other along a row are not 0."""
    if weight_OI.dim() != 2 or weight_OI.shape[1] % 4:
        return False
    return bool(((weight_OI != 0).reshape(-1, 4).sum(-1) <= 2).all())


def to_semi_structured(model: nn.Module, layers: Iterable[str] | None = None) -> list[str]:
    """Put semi-structured sparse tensors in the place of the weights of linear layers, for inference.

    Outputs stay the same up to rounding. The parameters are frozen afterwards and masks no longer act on them: do this
    last, on a model in half precision that is on its GPU, and save the dense weights.

    Args:
        model: changed in place.
        layers: names of linear layers; None for every one that is 2:4 and fits (others are left and logged).

    Returns:
        Names of the layers that have been converted.

    Raises:
        ModelError: the device has no sparse matrix products, there is no such layer, or one that is named is not 2:4,
            has another type, or dimensions that are no multiple of 64; nothing has changed then.

    Source: Mishra et al. 2021, Accelerating Sparse Deep Neural Networks.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model: a {type(model).__name__} is not allowed. Allowed: a torch.nn.Module")
    if isinstance(layers, str):
        raise ModelError(f"layers: {layers!r} is a text. Allowed: a list of names, such as [{layers!r}]")
    linear = {name: one for name, one in model.named_modules() if type(one) is nn.Linear}
    named = list(linear) if layers is None else list(layers)
    for name in named:
        if name not in linear:
            raise ModelError(unknown("layers", name, linear))
    reasons = {name: obstacle(linear[name].weight) for name in named}
    unfit = {name: reason for name, reason in reasons.items() if reason}
    if layers is not None and unfit:
        name, reason = next(iter(unfit.items()))
        raise ModelError(f"{name}.weight: {reason}")
    chosen = [name for name in named if name not in unfit]
    for name, reason in unfit.items():
        log.info("%s stays dense: %s", name, reason)
    if not chosen:
        found = "; ".join(f"{name}: {reason}" for name, reason in list(unfit.items())[:3]) or "there is no nn.Linear"
        raise ModelError(f"model: no linear layer can become semi-structured. {found}")
    for name in chosen:
        check_device(linear[name].weight, name)
    sparse = {name: torch.sparse.to_sparse_semi_structured(linear[name].weight.detach()) for name in chosen}
    for name, tensor in sparse.items():
        linear[name].weight = nn.Parameter(tensor, requires_grad=False)
    return chosen


def obstacle(weight_OI: Tensor) -> str:
    """Why a weight cannot become semi-structured whatever the device, or an empty text."""
    if weight_OI.dtype not in DTYPES:
        return f"its type is {weight_OI.dtype}. Allowed: torch.float16, torch.bfloat16"
    if any(size % MULTIPLE for size in weight_OI.shape):
        return f"its shape {tuple(weight_OI.shape)} does not fit. Allowed: multiples of {MULTIPLE}"
    if not is_two_of_four(weight_OI):
        return "it is not 2:4. Allowed: at most 2 weights that are not 0 of every 4 along a row"
    return ""


def check_device(weight_OI: Tensor, name: str) -> None:
    """Refuse a weight on a device without sparse matrix products.

    Raises:
        ModelError: it is not on a CUDA device of capability 8.0 or above.
    """
    device = weight_OI.device
    if device.type != "cuda":
        raise ModelError(
            f"{name}.weight: it is on {str(device)!r}, which has no semi-structured sparse products. Allowed: a CUDA "
            "device of capability 8.0 or above; elsewhere the zeros save nothing by themselves"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        raise ModelError(
            f"{name}.weight: {torch.cuda.get_device_name(device)} has the capability {capability[0]}.{capability[1]}. "
            "Allowed: 8.0 or above"
        )
