"""CUDA tensors on a machine without a GPU: a model is moved onto them, and a watch sees what runs there.

Shapes, devices and waits of the host are found, and launches counted; values are not computed. Backward needs a real
device, so gradients are put there by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero"}
ROOM = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
ELEMENTS, BLOCKS, TENSORS = 65536, 320, {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""What one launch of a multi-tensor operation of PyTorch takes: elements of a block, blocks, and tensors by lists."""
CONCATENATED = 128
"""Tensors that one launch of a concatenation takes."""


class Waits(Exception):
    """The host waits for the GPU, or something is done that a CUDA graph cannot capture."""


def need_fake_cuda() -> None:
    """Skip the test where PyTorch asks the driver even for fake tensors (2.6 does), and there is none."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7) and not torch.cuda.is_available():
        pytest.skip("this PyTorch makes no fake CUDA tensors without a GPU")


@contextmanager
def fake_cuda() -> Iterator[None]:
    """New tensors are fake inside the block, and the CPU's constants may be copied to fake CUDA."""
    need_fake_cuda()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


class Watch(TorchDispatchMode):
    """Refuses in a step what would wait for a GPU or could not be captured in a CUDA graph, and counts launches.

    Refused are the reading of a value, operations whose result's size depends on values, and every tensor on the CPU,
    since it could only be there to be copied.

    Args:
        strict: whether to refuse anything.

    Attributes:
        launches: how many kernels there were, views and allocations being none.
        operations: how many of each kind.
    """

    def __init__(self, strict: bool = True) -> None:
        super().__init__()
        self.strict, self.launches = strict, 0
        self.operations: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten":  # records of the profiler, questions about devices
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if self.strict:
            self._check(name, func, args, kwargs)
        out = func(*args, **kwargs)
        if self.strict and any(one.device.type == "cpu" for one in _tensors(out)):
            raise Waits(f"{func} makes a tensor on the CPU")
        count = _launches(name, func, args)
        if count:
            self.launches += count
            self.operations[name] = self.operations.get(name, 0) + count
        return out

    def _check(self, name: str, func: Any, args: Any, kwargs: Any) -> None:
        if name.rstrip("_") in WAITS:
            raise Waits(f"{func} waits for the GPU")
        indices = args[1] if name in ("index", "index_put_", "index_put", "_index_put_impl_") else ()
        if any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in indices):
            raise Waits(f"{func} with a mask waits for the GPU")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise Waits(f"{func} waits for the GPU")
        for one in _tensors((args, kwargs)):
            if one.device.type == "cpu":
                raise Waits(f"{func} works on a tensor on the CPU of shape {tuple(one.shape)}")


def _tensors(values: Any) -> list[Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, Tensor)]


def _launches(name: str, func: Any, args: Any) -> int:
    """How many kernels an operation launches on a GPU."""
    if func.is_view or name in ROOM or name in ("detach", "alias", "split", "split_with_sizes", "unbind", "lift_fresh"):
        return 0
    if name.startswith("_foreach_"):
        return _foreach_launches([one for one in args if isinstance(one, (list, tuple))])
    if name == "cat":
        return -(-len(args[0]) // CONCATENATED)
    return 1


def _foreach_launches(lists: list[Any]) -> int:
    """A few launches where all tensors are alike and those of an item have one shape; otherwise one for each item."""
    first = lists[0][0]
    plain = all(
        one.dtype is first.dtype and one.device == first.device and one.shape == item[0].shape
        and one.stride() == item[0].stride()
        for item in zip(*lists, strict=True)
        for one in item
    )  # fmt: skip
    if not plain:
        return len(lists[0])
    blocks = sum(math.ceil(one.numel() / ELEMENTS) for one in lists[0])
    return max(-(-blocks // BLOCKS), -(-len(lists[0]) // TENSORS[len(lists)]))


def move_to_cuda(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = (), *others: nn.Module) -> None:
    """What ``model.cuda()`` does, inside :func:`fake_cuda`: parameters and buffers stay the same objects.

    Optimizers' states follow, as after ``load_state_dict``; gradients go.
    """
    for tensor in (one for each in (model, *others) for one in (*each.parameters(), *each.buffers())):
        if tensor.device.type == "cpu":
            tensor.grad = None
            _become(tensor, _fake(tensor))
    for optimizer in optimizers:
        for state in optimizer.state.values():
            state.update({key: _fake(one) for key, one in state.items() if isinstance(one, Tensor)})


def put_gradients(model: nn.Module) -> None:
    """A gradient for every parameter, and what happens where gradients are accumulated."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
            for hook in (parameter._post_accumulate_grad_hooks or {}).values():
                hook(parameter)


def _fake(tensor: Tensor) -> Tensor:
    values = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _become(tensor: Tensor, other: Tensor) -> None:
    """``torch.utils.swap_tensors``, which refuses fake tensors because their mode knows them."""
    kinds, contents = (type(tensor), type(other)), (dict(vars(tensor)), dict(vars(other)))
    tensor.__class__, other.__class__ = kinds[1], kinds[0]
    for one, content in ((tensor, contents[1]), (other, contents[0])):
        vars(one).clear()
        vars(one).update(content)
    torch._C._swap_tensor_impl(tensor, other)
