"""Runs a model once and carries along, with every tensor, the slots that its entries belong to.

A :class:`Follower` sees the operations that PyTorch dispatches. Each kind of operation has a rule (``@rule``) that says
which slots go together and what slots the results have. What has no rule locks what reaches it, by name, with the layer
and the line of the user's code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from pruningawaretraining.models.reduction_sites import is_plain
from pruningawaretraining.patterns.coupling import Deadline
from pruningawaretraining.patterns.labels.flow import Flow
from pruningawaretraining.patterns.labels.meeting import Operand, meet
from pruningawaretraining.patterns.labels.notes import Mixing, Size, Work
from pruningawaretraining.patterns.labels.sites import Calls, Reduced
from pruningawaretraining.patterns.labels.slots import Array, Slots, varying

INPUT = "an input of the model, or what is made of it, whose size is fixed"
CONSTANT = "a tensor that is no parameter or buffer of any module"
_SKIPPED = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]))

Results = Sequence[Sequence[Array]]
"""The slots of each tensor that an operation returns."""


@dataclass(eq=False)
class Call:
    """One operation: its arguments by name, its results, and the follower."""

    follower: Follower
    name: str
    func: Any
    values: dict[str, Any]
    out: Any
    given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    @property
    def slots(self) -> Slots:
        return self.follower.slots

    @property
    def x(self) -> Tensor:
        """The first argument."""
        found: Tensor = next(iter(self.values.values()))
        return found

    @property
    def outputs(self) -> list[Tensor]:
        return [one for one in tree_leaves(self.out) if isinstance(one, Tensor)]

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, in order."""
        return [one for one in tree_leaves(self.values) if isinstance(one, Tensor)]

    def arrays(self, tensor: Any) -> list[Array]:
        return self.follower.get(tensor) if isinstance(tensor, Tensor) else []

    def reason(self, what: str) -> str:
        return f"{what} {self.follower.where()}"

    def operand(self, tensor: Tensor, dims: int, arrays: Sequence[Array] | None = None) -> Operand:
        """A tensor as one that takes part in a meeting of so many dimensions."""
        own = self.arrays(tensor) if arrays is None else arrays
        return Operand.of(tensor.shape, own, dims, self.follower.why_fixed(tensor))

    def meet(self, tensors: Sequence[Tensor], dims: int) -> list[Array]:
        """Tensors that meet entry by entry, broadcast."""
        return meet(self.slots, [self.operand(one, dims) for one in tensors], self.reason)

    def lock(self, array: Array, what: str) -> None:
        self.slots.lock(array, self.reason(what))

    def without(self, arrays: Sequence[Array], dims: Sequence[int], what: str) -> list[Array]:
        """Arrays that vary along none of these dimensions: others go together along them, or stay."""
        found = []
        for array in arrays:
            own = set(varying(array))
            if own and own <= set(dims):
                self.lock(array, what)
            else:
                found.append(self.slots.tie(array, own & set(dims)))
        return found

    def work(self, met: Sequence[Array], summed: int) -> None:
        """Note the products that an operation computes outside of PyTorch's layers.

        Args:
            met: slots of what was multiplied, the dimension that is summed over included.
            summed: that dimension.
        """
        if self.follower.stack[-1] in self.follower.layers:
            return
        formula = flop_registry.get(self.func._overloadpacket)
        args, kwargs = self.given
        lines = [one for one in met if len(varying(one)) == 1]
        if formula is not None and lines:
            inside = tuple(one.reshape(-1) for one in lines if one.shape[summed] > 1)
            outside = tuple(one.reshape(-1) for one in lines if one.shape[summed] == 1)
            macs = int(formula(*args, **kwargs, out_val=self.out)) // 2
            self.follower.works.append(Work(self.follower.stack[-1], macs, outside, inside, self.follower.where()))

    def virtual(self, shape: Sequence[int], dims: Sequence[int]) -> list[Array]:
        """Fresh slots for dimensions whose sizes the code computes."""
        found = []
        for dim in dims:
            if shape[dim] > 1:
                sizes = [1] * len(shape)
                sizes[dim] = shape[dim]
                found.append(self.slots.new(shape[dim]).reshape(sizes))
        return found


Rule = Callable[[Call], Results]
RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register what operations do to slots; their names, without a last underscore, have spaces between them."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


class Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows slots through whatever is run inside it; see :func:`followed`.

    Args:
        slots: where slots are kept.
        tensors: parameters and buffers by name.
        deadline: what is run later is not followed.
        layers: modules that sum products in the way that PyTorch's layers do.
        stated: note the widths of all views, and not only of those that cut channels.
    """

    def __init__(
        self,
        slots: Slots,
        tensors: Mapping[str, Tensor],
        deadline: Deadline,
        layers: Collection[str] = (),
        stated: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots, self.deadline, self.layers, self.stated = slots, deadline, layers, stated
        self.stack: list[str] = [""]
        self.called: list[str] = [""]
        self.reductions, self.reducing = list[Reduced](), list[Reduced]()
        self.mixings: list[Mixing] = []
        self.sizes: list[Size] = []
        self.works: list[Work] = []
        self.entered: dict[str, list[list[Array]]] = {}
        self.read, self.returned = set[str](), set[str]()
        self.flow = Flow()
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        self._arrays: Any = WeakTensorKeyDictionary()  # type: ignore[no-untyped-call]
        self._own = slots.own(tensors)
        self.tensors = dict(tensors)

    def get(self, tensor: Tensor) -> list[Array]:
        """The slots of a tensor."""
        name = self._names.get(id(tensor))
        if name is not None:
            self.read.add(name)
            return list(self._own[name])
        return list(self._arrays.get(tensor, ()))

    def put(self, tensor: Tensor, arrays: Sequence[Array]) -> None:
        """Say what the slots of a tensor are."""
        if id(tensor) not in self._names:
            self._arrays[tensor] = tuple(one for one in arrays if varying(one))

    def why_fixed(self, tensor: Tensor) -> str:
        known = id(tensor) in self._names or tensor in self._arrays
        return INPUT if known else CONSTANT

    def where(self) -> str:
        """The layer and the line of the user's code that is being run."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(_SKIPPED):
            frame = frame.f_back
        layer = f"in {self.stack[-1]}" if self.stack[-1] else "in the model's own code"
        if frame is None:
            return layer
        return f"{layer} ({Path(frame.f_code.co_filename).name}, line {frame.f_lineno})"

    def mix(self, array: Array, what: str) -> None:
        """Note an operation over channels."""
        if varying(array):
            slots = array.reshape(-1)
            same = (one.place for one in self.reducing if one.slots is not None and np.array_equal(one.slots, slots))
            self.mixings.append(Mixing(self.stack[-1], slots, what, self.where(), next(same, None)))

    def sized(self, size: int, array: Array) -> None:
        """Note a width that the code states or computes."""
        if size > 1:
            self.sizes.append(Size(self.stack[-1], size, array.reshape(-1)))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = RULES.get(_name_of(func))
        if found is None and not _is_pointwise(func):  # perhaps it is made of others
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        call = Call(self, _name_of(func), func, _by_name(func, args, kwargs), out, (args, kwargs))
        if self.deadline.passed:
            found = _late
        elif found is None:
            found = RULES["pointwise"] if _is_pointwise(func) else _unknown
        with torch.utils._python_dispatch._disable_current_modes():
            self.flow.note(call.tensors(), call.outputs)
            results = found(call)
        for tensor, arrays in zip(call.outputs, [*results, *([[]] * len(call.outputs))], strict=False):
            self.put(tensor, arrays)
        return out


def _name_of(func: Any) -> str:
    name: str = func._schema.name.partition("::")[2]
    return name.rstrip("_") if not name.startswith("__") else name


def _is_pointwise(func: Any) -> bool:
    return torch.Tag.pointwise in func.tags


def _by_name(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    arguments = func._schema.arguments
    values = {one.name: one.default_value for one in arguments if one.has_default_value()}
    given = {one.name: value for one, value in zip(arguments, args, strict=False)}
    return {one.name: {**values, **given, **kwargs}.get(one.name) for one in arguments}


def _late(call: Call) -> Results:
    return _locked(call, f"reaches {call.follower.deadline.reason}")


def _unknown(call: Call) -> Results:
    return _locked(call, f"reaches {call.name!r}, an operation that is not understood,")


def _locked(call: Call, why: str) -> Results:
    for tensor in call.tensors():
        for array in call.arrays(tensor):
            call.lock(array, why)
    return []


@contextmanager
def followed(follower: Follower, model: nn.Module) -> Iterator[None]:
    """Follow what is run inside the block, and know which module runs."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(_enter, follower, name)))
        handles.append(module.register_forward_hook(partial(_leave, follower, name), always_call=True))
    try:
        with follower, Calls(follower, model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(follower: Follower, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    follower.stack.append(name)
    follower.called.append("")
    for one in [one for one in inputs if isinstance(one, Tensor)][:1]:
        follower.entered.setdefault(name, []).append(follower.get(one))


def _leave(follower: Follower, name: str, module: nn.Module, *_: Any) -> None:
    if name in follower.stack:
        while follower.stack.pop() != name:
            follower.called.pop()
        follower.called.pop()
        follower.called[-1] = follower.called[-1] if is_plain(module) else name
