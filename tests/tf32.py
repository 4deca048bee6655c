"""What a GPU does to float32 products, on the CPU: both factors are rounded to TF32 where widths are multiples of 4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
FACTORS = {  # operation -> where its two factors stand among the arguments
    aten.convolution.default: (0, 1),
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}
DROPPED = 13  # of float32's 23 bits of mantissa, TF32 keeps 10


def rounded(x: Tensor) -> Tensor:
    """The nearest values with 10 bits of mantissa."""
    bits = x.contiguous().view(torch.int32)
    half = 1 << (DROPPED - 1)
    return (((bits + half) >> DROPPED) << DROPPED).view(torch.float32)


def _in_tensor_cores(operation: Any, left: Tensor, right: Tensor) -> bool:
    if left.dtype is not torch.float32 or left.is_meta:
        return False
    widths = right.shape[:2] if operation is aten.convolution.default else (left.shape[-1], right.shape[-1])
    return all(width % 4 == 0 for width in widths)


class EmulatedTF32(TorchDispatchMode):
    """Inside the block float32 products are computed as on a GPU, whose kernels are chosen by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = FACTORS.get(func)
        if places is not None and _in_tensor_cores(func, args[places[0]], args[places[1]]):
            self.rounded += 1
            args = tuple(rounded(one) if place in places else one for place, one in enumerate(args))
        return func(*args, **(kwargs or {}))
