"""CUDA tensors on a machine without a GPU, and what is done with them: operations, bytes, and waits for the device.

Tensors on the device are fake (shapes and devices are right, nothing is computed); those on the CPU are real. Where the
host reads a number of the device it is given 0, and the wait is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fake_device import need_fake_cuda
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default, torch.ops.aten.is_nonzero.default)
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
FILLING = ("aten.zeros", "aten.ones", "aten.full", "aten.new_", "aten.fill_", "aten.zero_")
CASTING = (torch.ops.aten.sum, torch.ops.aten.cumsum, torch.ops.aten.mean)  # these convert to the result's type first


class DeviceMeter(TorchDispatchMode):
    """Counts what reaches the device.

    Attributes:
        calls: operations on the device by name; views are not counted.
        moved: bytes that they read and write, by the same names.
        waits: how often the host waits: numbers read, and copies from one to the other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.start()

    def start(self) -> None:
        """Count from 0 again."""
        self.calls: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        there = any(isinstance(one, FakeTensor) for one in given)
        to = kwargs.get("device")
        if not there and (to is None or torch.device(to).type == "cpu"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in READS:
            self.waits[str(func)] += 1
            return 0
        result = func(*args, **kwargs)
        made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        if func in COPIES and len({one.device for one in [*given, *made]}) > 1:
            self.waits[str(func)] += 1
            if made[0].device.type == "cpu":
                with unset_fake_temporarily():
                    return tree_map_only(Tensor, lambda one: torch.zeros(one.shape, dtype=one.dtype), result)
        if made and not func.is_view:
            self._count(func, args, kwargs, made)
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
        name = str(func)
        self.calls[name] += 1
        if "empty" in name:
            return
        read = [] if name.startswith(FILLING) else tree_leaves((args, {**kwargs, "out": None}))
        touched = [*{id(one): one for one in read if isinstance(one, Tensor)}.values(), *made]
        moved = sum(min(one.numel() * one.element_size(), one.untyped_storage().nbytes()) for one in touched)
        if func.overloadpacket in CASTING and made[0].dtype != touched[0].dtype:
            moved += 2 * touched[0].numel() * made[0].element_size()
        self.moved[name] += moved


@contextmanager
def metered() -> Iterator[DeviceMeter]:
    """Tensors made for "cuda" are fake in here, and what is done with them is counted."""
    need_fake_cuda()
    with FakeTensorMode(allow_non_fake_inputs=True), DeviceMeter() as meter:
        yield meter
