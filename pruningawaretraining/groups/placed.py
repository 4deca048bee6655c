"""Constants on the devices that need them, each copied once.

An index that is copied to a GPU in every step makes the host wait there, and no CUDA graph can capture that.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_COPIES = WeakTensorKeyDictionary()


def placed(constant: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor that nothing ever changes, on a device: the same copy at every call.

    Args:
        constant: an index vector, say. The copies live as long as it does.
        device: of the tensor that it acts on, with its number, as ``tensor.device`` gives it.
        dtype: of the copy; None for the constant's own.
    """
    dtype = constant.dtype if dtype is None else dtype
    if constant.device == device and constant.dtype is dtype:
        return constant
    if constant not in _COPIES:
        _COPIES[constant] = {}
    copies: dict[tuple[torch.device, torch.dtype], Tensor] = _COPIES[constant]
    if (device, dtype) not in copies:
        copies[device, dtype] = constant.to(device, dtype)
    return copies[device, dtype]
