"""A snapshot of weights, buffers and optimizer state at one step, to go back to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.distributed.fsdp import full_of, is_sharded, local_of, part_of
from pruningawaretraining.errors import CheckpointError, ModelError
from pruningawaretraining.masks.dynamics import Dynamic


class Snapshot:
    """Weights, buffers and optimizer state of a model as they were before one step.

    An optimizer steps when the model has been run, and norms have moved on: buffers are kept when the step before it is
    over, or from the start, and again whenever a state is loaded in between.

    Args:
        model: the model.
        at: optimizer steps before the one at which it is taken.
    """

    def __init__(self, model: nn.Module, at: int) -> None:
        self.model, self.at = model, at
        self.tensors: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._comes = at == 0  # whether its step is the next one
        register: Any = model.register_load_state_dict_post_hook
        self._handle = register(self._loaded)
        self._keep_buffers()
        self.optimizer: dict[str, dict[str, Any]] = {}  # name of a parameter -> its state

    @classmethod
    def of(cls, model: nn.Module, dynamic: Dynamic) -> Snapshot | None:
        """The snapshot that a dynamic goes back to; None for other dynamics."""
        return cls(model, dynamic.to) if dynamic.rewinds else None

    def before_step(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Take it, if its step is about to come.

        Args:
            optimizer: what is about to step.
            steps: optimizer steps so far.
        """
        if self.tensors or steps != self.at:
            return
        self.tensors = {name: value.detach().clone() for name, value in _tensors_of(self.model)} | self._buffers
        self._comes, self._buffers = False, {}
        self._handle.remove()
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for parameter, state in optimizer.state.items():
            if id(parameter) in names:
                self.optimizer[names[id(parameter)]] = {key: _copied(value) for key, value in state.items()}

    def after_step(self, steps: int) -> None:
        """Keep the buffers, if the next step is its own; ``steps`` counts those so far."""
        if steps == self.at and not self.tensors:
            self._comes = True
            self._keep_buffers()

    def _loaded(self, *_: Any) -> None:
        """A state has been loaded into the model."""
        self._keep_buffers()

    def _keep_buffers(self) -> None:
        if self._comes:
            self._buffers = {name: value.detach().clone() for name, value in self.model.named_buffers()}

    @torch.no_grad()
    def restore(self, optimizers: Iterable[torch.optim.Optimizer]) -> bool:
        """Put everything back; returns False where it has not been taken yet.

        Args:
            optimizers: their state of the model's parameters goes back too; their rates stay.

        Raises:
            ModelError: a tensor has another shape than it had then; nothing has changed.
        """
        if not self.tensors:
            return False
        now = dict(_tensors_of(self.model))
        for name, value in self.tensors.items():
            if name in now and now[name].shape != value.shape:
                raise ModelError(
                    f"dynamic: 'rewind' cannot go back: {name} had the shape {tuple(value.shape)} then and has "
                    f"{tuple(now[name].shape)} now"
                )
        for name, value in self.tensors.items():
            if name in now:
                _put(now[name], value)
        for optimizer in optimizers:
            for name, parameter in self.model.named_parameters():
                if name in self.optimizer:
                    state = self.optimizer[name]
                    optimizer.state[parameter] = {key: _stored(value, parameter) for key, value in state.items()}
                elif parameter in optimizer.state:
                    del optimizer.state[parameter]
        return True

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data; whole tensors, gathered where they are spread over processes (a collective)."""
        buffers = {"buffers": {**self._buffers}} if self._comes else {}
        return {
            "tensors": {name: full_of(value) for name, value in self.tensors.items()},
            **buffers,
            "optimizer": {
                name: {key: full_of(value) if isinstance(value, Tensor) else value for key, value in one.items()}
                for name, one in self.optimizer.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` gave.

        Raises:
            CheckpointError: a tensor is of no parameter or buffer of this model.
        """
        now = dict(_tensors_of(self.model))
        for name in state["tensors"]:
            if name not in now:
                raise CheckpointError(f"state: the weights to rewind to have {name!r}, and the model has not")
        self._buffers = dict(state.get("buffers", {}))
        self._comes = "buffers" in state
        if state["tensors"]:
            self._handle.remove()
        self.tensors = {name: value.to(now[name].device) for name, value in state["tensors"].items()}
        self.optimizer = {name: dict(one) for name, one in state["optimizer"].items()}


def _tensors_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _put(tensor: Tensor, value: Tensor) -> None:
    """Write values into a tensor; of whole ones this process's part, where the tensor is spread over several."""
    if is_sharded(tensor) and not is_sharded(value):
        local_of(tensor).copy_(part_of(tensor, value))
    else:
        tensor.copy_(value)


def _stored(value: Any, parameter: Tensor) -> Any:
    """A copy of an entry of a parameter's state, spread over processes as the parameter is."""
    whole = isinstance(value, Tensor) and not is_sharded(value) and value.shape == parameter.shape
    if not whole or not is_sharded(parameter):
        return _copied(value)
    spread = torch.zeros_like(parameter.detach(), dtype=value.dtype)
    _put(spread, value)
    return spread
