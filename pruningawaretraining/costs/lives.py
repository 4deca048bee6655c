"""When the activations of a forward pass are made, and when they are let go."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pruningawaretraining.models.calling import ForwardFn, beside, checked_call, evaluating
from pruningawaretraining.models.trees import tensors_of


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        name: of the module.
        begun, ended: operations before it began, and when it ended.
        given, made: numbers of the tensors that it is given and makes; None for one that is no activation.
    """

    name: str
    begun: int
    ended: int
    given: int | None
    made: int | None


@dataclass
class Lives:
    """Tensors of a forward pass in order of allocation.

    Attributes:
        bytes_T: size of each.
        born_T, died_T: number of the operation that made it, and of the one before which it was let go.
        calls: those of the modules that were asked for, in the order in which they ended.
    """

    bytes_T: list[int] = field(default_factory=list)
    born_T: list[int] = field(default_factory=list)
    died_T: list[int] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """The most bytes at one moment."""
        changes: dict[int, int] = {}
        for size, born, died in zip(self.bytes_T, self.born_T, self.died_T, strict=True):
            changes[born] = changes.get(born, 0) + size
            changes[died] = changes.get(died, 0) - size
        held, most = 0, 0
        for moment in sorted(changes):
            held += changes[moment]
            most = max(most, held)
        return most


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records each new storage and when it is freed."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lives, self.moment = Lives(), 0
        self._known, self._numbers = known, dict[int, int]()
        self._finalizers: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.moment += 1
        for tensor in tensors_of(out):
            self._note(tensor)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self._numbers[key] = number = len(self.lives.bytes_T)
        self.lives.bytes_T.append(storage.nbytes())
        self.lives.born_T.append(self.moment)
        self.lives.died_T.append(-1)

        def gone() -> None:
            self.lives.died_T[number] = self.moment + 1
            self._known.discard(key)
            self._numbers.pop(key, None)

        self._finalizers.append(weakref.finalize(storage, gone))

    def follow(self, name: str, module: nn.Module) -> list[Any]:
        """Record the calls of a module; returns the hooks, to be removed."""
        begun: list[tuple[int, int | None]] = []

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            begun.append((self.moment, self._number((args, kwargs))))

        def end(module: nn.Module, args: Any, output: Any) -> None:
            at, given = begun.pop()
            self.lives.calls.append(Call(name, at, self.moment, given, self._number(output)))

        return [module.register_forward_pre_hook(begin, with_kwargs=True), module.register_forward_hook(end)]

    def _number(self, values: Any) -> int | None:
        first = next(iter(tensors_of(values)), None)
        return None if first is None else self._numbers.get(first.untyped_storage()._cdata)

    def close(self) -> Lives:
        """Close the lifetimes of tensors that live to the end."""
        for one in self._finalizers:
            one.detach()
        self.lives.died_T = [self.moment + 1 if died < 0 else died for died in self.lives.died_T]
        return self.lives


def activation_lives(
    model: nn.Module, example_inputs: Any, forward_fn: ForwardFn | None = None, within: Iterable[str] = ()
) -> Lives:
    """The tensors of one forward pass in eval mode; inputs, weights and buffers are not among them.

    Args:
        model: the model.
        example_inputs, forward_fn: how to run it.
        within: names of modules whose calls are recorded.

    Raises:
        ModelError: the model rejects the inputs.
    """
    example_inputs = beside(model, example_inputs)  # copies of inputs do not count as activations
    owned = [*model.parameters(), *model.buffers(), *tensors_of(example_inputs)]
    watch = _Watch({one.untyped_storage()._cdata for one in owned})
    handles = [hook for name in within for hook in watch.follow(name, model.get_submodule(name))]
    try:
        with torch.no_grad(), evaluating(model), watch:
            outputs = checked_call(model, example_inputs, forward_fn)
    finally:
        for handle in handles:
            handle.remove()
    lives = watch.close()
    del outputs
    return lives
