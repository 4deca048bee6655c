"""CUDA tensors without a GPU on which whole events run: what the host asks of the device is counted, and answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SCALAR, NONZERO = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default
COPY = torch.ops.aten._to_copy.default


class Questions(TorchDispatchMode):
    """Answers 0 to what asks for a value and "nowhere" to what asks for places.

    Attributes:
        asked: how often, by kind: "value", "places", "copy" (of a tensor to the CPU).
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = any(isinstance(one, Tensor) and one.device.type == "cuda" for one in tree_leaves((args, kwargs)))
        if func is SCALAR:
            self.asked["value"] += there
            return 0.0 if args[0].dtype.is_floating_point else 0
        if func is NONZERO:
            self.asked["places"] += there
            return args[0].new_empty((0, args[0].dim()), dtype=torch.int64)
        if func is COPY and there and str(kwargs.get("device")) == "cpu":
            self.asked["copy"] += 1
        return func(*args, **kwargs)


@contextmanager
def pretend_cuda() -> Iterator[Questions]:
    """Inside, new tensors are on a GPU that is not there; mixing devices raises."""
    with FakeTensorMode(), Questions() as questions, torch.device("cuda"):
        yield questions
