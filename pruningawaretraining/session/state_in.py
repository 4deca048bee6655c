"""The pruner's state inside ``model.state_dict()``, so that a trainer's own checkpoints hold it and bring it back.

The module's own hooks do it: one after ``state_dict`` adds a tensor of bytes, one before ``load_state_dict`` takes it
out and gives the model the architecture of the checkpoint before its weights are loaded. A copy of the model (a moving
average, a teacher) has the hooks too, but no pruner: it writes nothing, and leaves out what is not meant for it.
"""

from __future__ import annotations

import io
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.checkpoint.records import PRUNER_KEY
from pruningawaretraining.distributed.ddp import rewrap_in_place
from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.files import BROKEN
from pruningawaretraining.models.private import keep_private, private_of
from pruningawaretraining.models.wrappers import wrappers_of


class HasState(Protocol):
    """The part of a pruner that this module reads and writes."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], generators: bool = False) -> None: ...

    state_was_loaded: bool


class StateHandle:
    """Keeps the state of a pruner in; :meth:`remove` takes it out.

    Args:
        pruner: held weakly.
        handles: the hooks of its model.
    """

    def __init__(self, pruner: HasState, handles: list[RemovableHandle]) -> None:
        self.pruner, self._handles = weakref.ref(pruner), handles

    def remove(self) -> None:
        """Leave the pruner's state out of ``model.state_dict()`` again."""
        for handle in self._handles:
            handle.remove()


ATTRIBUTE = "_pruning_state_in"


def put_state_in(model: nn.Module, pruner: HasState) -> StateHandle:
    """Let the state of a pruner travel inside the state dict of its model.

    Args:
        model: without wrappers.
        pruner: it is held weakly; once it is gone, its state is no longer written.
    """
    before: StateHandle | None = private_of(model, ATTRIBUTE)
    if before is not None:
        before.remove()
    hooked: Any = model  # PyTorch leaves these two without types
    handles = [hooked.register_state_dict_post_hook(_write), hooked.register_load_state_dict_pre_hook(_read)]
    made = StateHandle(pruner, handles)
    keep_private(model, ATTRIBUTE, made)
    return made


def packed(state: Mapping[str, Any]) -> Tensor:
    """A state as bytes: a tensor of uint8, for files that hold tensors only."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def unpacked(data: Any) -> dict[str, Any]:
    """The state in such a tensor.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(
            io.BytesIO(data.cpu().numpy().tobytes()), map_location="cpu", weights_only=True
        )
    except BROKEN as error:
        raise CheckpointError(f"state_dict: the pruner's state in it is damaged: {error!s:.80}") from error
    return state


class Deferred(Tensor):
    """Bytes that are made when they are first used: some averages read ``model.state_dict()`` in every step."""

    _make: Callable[[], Tensor]
    _made: Tensor | None

    @classmethod
    def of(cls, make: Callable[[], Tensor]) -> Deferred:
        """A tensor that is what a function gives, when it is needed."""
        one = torch.empty(0, dtype=torch.uint8).as_subclass(cls)
        one._make, one._made = make, None
        return one

    def made(self) -> Tensor:
        """The plain tensor; from its first use on it stays as it is."""
        if self._made is None:
            self._made = self._make()
        return self._made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any use of it is one of the plain tensor."""
        args, kwargs = (
            _plain(args),
            {name: _plain(value) for name, value in (kwargs or {}).items()},
        )
        return func(*args, **kwargs)


def _plain(nest: Any) -> Any:
    if isinstance(nest, Deferred):
        return nest.made()
    if type(nest) in (tuple, list):
        return type(nest)(_plain(one) for one in nest)
    return nest


def _alive(module: nn.Module) -> HasState | None:
    known: StateHandle | None = private_of(module, ATTRIBUTE)
    return None if known is None else known.pruner()


def _write(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook after ``state_dict``."""
    pruner = _alive(module)
    if pruner is not None:
        state_dict[prefix + PRUNER_KEY] = Deferred.of(lambda: packed(pruner.state_dict()))


def _read(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook before ``load_state_dict``: the architecture comes first."""
    data = state_dict.pop(prefix + PRUNER_KEY, None)
    pruner = _alive(module)
    if data is None or pruner is None:
        return
    pruner.load_state_dict(unpacked(data), generators=True)
    pruner.state_was_loaded = True
    for wrapped in wrappers_of(module):
        rewrap_in_place(wrapped)
