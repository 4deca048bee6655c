"""What the callbacks have in common: they make a pruner for the trainer's model, and keep its wrapper up to date."""

from __future__ import annotations

import gc
import importlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruningawaretraining.checkpoint import write_atomically
from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.inputs import ForwardFn, unwrap
from pruningawaretraining.processes import rank, rewrap_in_place, world
from pruningawaretraining.pruning import Pruning, Source

STATE = "pruner.pt"
"""Name of the pruner's state in a checkpoint's folder."""


def imported(name: str, extra: str) -> Any:
    """A module of an optional dependency.

    Raises:
        ConfigError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"integrations: {name.split('.')[0]} is not installed. Allowed: pip install 'pruningawaretraining[{extra}]'"
        ) from error


class Attached:
    """A pruner that waits for the trainer's model.

    Args:
        config: as for :class:`~pruningawaretraining.Pruning`.
        example_inputs, forward_fn, ema, teacher: likewise.
        state: of a pruner that this one goes on from.
    """

    def __init__(
        self,
        config: Source,
        example_inputs: Any = None,
        forward_fn: ForwardFn | None = None,
        ema: nn.Module | list[nn.Module] | None = None,
        teacher: nn.Module | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.example_inputs, self.forward_fn = config, example_inputs, forward_fn
        self.options: dict[str, Any] = {"ema": ema, "teacher": teacher}
        self.state = state
        self.made: Pruning | None = None

    def make(self, model: nn.Module) -> Pruning:
        """The pruner of a model, made once, before any optimizer; with a state, the model gets its architecture."""
        if self.made is None:
            inputs, forward_fn = self.example_inputs, self.forward_fn
            self.made = Pruning(unwrap(model), self.config, forward_fn, example_inputs=inputs, **self.options)
            if self.state is not None:
                self.made.load_state_dict(self.state)
        return self.made

    @property
    def pruner(self) -> Pruning:
        """The pruner.

        Raises:
            ConfigError: the trainer has not handed its model over yet.
        """
        if self.made is None:
            raise ConfigError("callback: there is no pruner before the trainer has the model. Allowed: once it trains")
        return self.made

    def epoch_ended(self, wrapped: nn.Module, epoch: int) -> None:
        """Let what is due after an epoch take place; a DistributedDataParallel is made anew where it is."""
        self.pruner.prune(None, epoch)
        rewrap_in_place(wrapped)


def write_state(pruner: Pruning, folder: str | Path) -> None:
    """Write the pruner's state into a checkpoint's folder, on the first process."""
    state = pruner.state_dict()
    if rank() == 0:
        write_atomically(Path(folder) / STATE, lambda path: torch.save(state, path))


def read_state(folder: str | Path) -> dict[str, Any]:
    """The pruner's state in a checkpoint's folder.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(folder) / STATE
    if not path.is_file():
        raise CheckpointError(
            f"resume_from: {str(folder)!r} holds no {STATE}. Allowed: a checkpoint of such a training"
        )
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"resume_from: {str(path)!r} cannot be read: {str(error).splitlines()[0]}") from error
    return state


def wrappers_of(model: nn.Module) -> list[nn.Module]:
    """Every DistributedDataParallel around a model, for trainers that hand none to a callback."""
    if world() == 1:
        return []
    kind = nn.parallel.DistributedDataParallel
    return [one for one in gc.get_objects() if issubclass(type(one), kind) and unwrap(one) is model]
