"""A second device that computes on the CPU: tensors there and tensors on the CPU do not mix, as with a real GPU.

Its tensors wrap tensors of the CPU. Inside ``with second_device():`` it is called "lazy", a device type that PyTorch
knows and nothing here uses: ``torch.zeros(3, device="lazy")``, ``model.to("lazy")`` and backward work, and an operation
on tensors of both raises what CUDA raises. Numbers come out as on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

THERE = torch.device("lazy", 0)
MIXED = "Expected all tensors to be on the same device, but found at least two devices, lazy:0 and cpu!"
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class Elsewhere(Tensor):
    """A tensor of the second device."""

    __slots__ = ("inner",)  # not in vars(): attributes of a parameter are handed on to its successor
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=THERE,
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Elsewhere({self.inner!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as its values: what a file holds is read to the CPU."""
        return self.inner.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Tensors that are made there, without one that is there already."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_there(kwargs.get("device")):
            return _computed(func, args, kwargs)
        return func(*args, **kwargs)


class _Calls(TorchFunctionMode):
    """What goes past every mode for operations: ``torch.tensor(values, device=...)``, and where a tensor lies."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _is_there(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": None}).to(THERE)
        if func is Tensor.data_ptr and isinstance(args[0], Elsewhere):
            return args[0].inner.data_ptr()
        return func(*args, **kwargs)


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == THERE.type


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    there = any(isinstance(one, Elsewhere) for one in given)
    here = any(not isinstance(one, Elsewhere) and one.dim() for one in given)
    if there and here and func not in COPIES:
        raise RuntimeError(f"{MIXED} (in {func})")
    if kwargs.get("device") is not None:
        there = _is_there(kwargs["device"])
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if func is torch.ops.aten.copy_.default:
        there = isinstance(args[0], Elsewhere)
    out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if not there:
        return out
    mine = {id(one.inner): one for one in given if isinstance(one, Elsewhere)}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return mine[id(value)] if id(value) in mine else Elsewhere(value)

    return tree_map(wrapped, out)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value


@contextmanager
def second_device() -> Iterator[torch.device]:
    """The second device, for as long as the block lasts."""
    with _Calls(), _Factories():
        yield THERE


def on_the_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs as if there were no second device: exporters do not run beside it."""

    @functools.wraps(function)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return alone
