"""Base of the callbacks: they make a pruner for the trainer's model, and keep its wrapper up to date."""

from __future__ import annotations

import importlib
import logging
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruningawaretraining.config.load import load_config
from pruningawaretraining.distributed.collectives import rank
from pruningawaretraining.distributed.ddp import rewrap_in_place
from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.files import read_torch_mapping, write_atomically
from pruningawaretraining.models.calling import ForwardFn, unwrap
from pruningawaretraining.models.private import keep_private, private_of
from pruningawaretraining.models.wrappers import watch_wrappers
from pruningawaretraining.session.arguments import given_averages
from pruningawaretraining.session.pruning import Pruning, Source

logger = logging.getLogger(__name__)

STATE = "pruner.pt"
"""Name of the pruner's state in a checkpoint's folder."""
OWNER = "_pruning_callback"
"""Where a model has the callback that prunes it, weakly."""


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

    Raises:
        ConfigError: the config cannot be used.
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
        self.config, self.example_inputs, self.forward_fn = load_config(config), example_inputs, forward_fn
        self.options: dict[str, Any] = {"ema": ema, "teacher": teacher}
        self.state = state
        self.made: Pruning | None = None
        self._guard: Any = None
        watch_wrappers()  # a trainer may wrap the model before the pruner is made

    def make(self, model: nn.Module, averages: Sequence[nn.Module] = ()) -> Pruning:
        """The pruner of a model, made once, before any optimizer; with a state, the model gets its architecture.

        Args:
            model: the model, or its wrapper.
            averages: moving averages of it that the trainer has made.

        Raises:
            ConfigError: it is another model than before, and a moving average of that one was given.
        """
        plain = unwrap(model)
        if self.made is not None and self.made.model is plain:
            return self.made
        if self.made is not None and self.options["ema"] is not None:
            raise ConfigError(
                f"ema: it is of the {type(plain).__name__} that this callback was used for before, and this is another "
                "one. Allowed: a new PruningCallback for every model"
            )
        self.release()
        inputs, forward_fn = self.example_inputs, self.forward_fn
        options = {**self.options, "ema": [*given_averages(self.options["ema"]), *averages]}
        self.made = Pruning(plain, self.config, forward_fn, example_inputs=inputs, **options)
        self.made.best_begins_anew = True
        self.made.state_in(plain)
        if self.state is not None:
            self.made.load_state_dict(self.state, generators=True)
        else:
            hook: Any = plain.register_load_state_dict_pre_hook
            self._guard = hook(_refuse_smaller)
        keep_private(plain, OWNER, weakref.ref(self))
        return self.made

    def begin(self, steps: int | None = None) -> None:
        """Training begins.

        Args:
            steps: optimizer steps of an epoch, where they are known.

        Raises:
            ConfigError: another callback prunes the same model.
        """
        self.release()
        pruner = self.pruner
        owner = private_of(pruner.model, OWNER)
        if owner is not None and owner() is not self:
            raise ConfigError(
                f"callbacks: two PruningCallbacks are of the same {type(pruner.model).__name__}. Allowed: one, with "
                "all rules in its config"
            )
        if pruner.phase == "done" and self.state is None:
            logger.warning(
                "callback: the pruner of this %s has ended with an earlier training; nothing is pruned any more. "
                "Allowed: another PruningCallback, or another model",
                type(pruner.model).__name__,
            )
        pruner.calls_prune = True
        pruner.on_train_begin(None if steps is None else range(steps))

    def release(self) -> None:
        """Let any weights be loaded into the model from here on."""
        if self._guard is not None:
            self._guard.remove()
            self._guard = None

    @property
    def pruner(self) -> Pruning:
        """The pruner.

        Raises:
            ConfigError: the trainer has not handed its model over yet.
        """
        if self.made is None:
            raise ConfigError("callback: the pruner is made once the trainer has the model. Allowed: during training")
        return self.made

    def epoch_ended(self, wrapped: nn.Module, epoch: int) -> bool:
        """Let what is due after an epoch take place; a DistributedDataParallel is made anew where it is.

        Returns:
            Whether channels have gone.
        """
        removed = self.pruner.prune(None, epoch) == "removed"
        rewrap_in_place(wrapped)
        return removed

    @property
    def resumed(self) -> bool:
        """Whether the pruner goes on from a state: a given one, or that in the model's weights."""
        return self.state is not None or (self.made is not None and self.made.state_was_loaded)


def _refuse_smaller(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Pre-hook of ``load_state_dict``: refuse the weights of a model that has lost channels, into a dense one."""
    for name, own in module.state_dict().items():
        given = state_dict.get(prefix + name)
        if not (isinstance(own, torch.Tensor) and isinstance(given, torch.Tensor)) or given.dim() != own.dim():
            continue
        if given.shape != own.shape and all(a <= b for a, b in zip(given.shape, own.shape, strict=True)):
            raise CheckpointError(
                f"resume_from: {name} is {tuple(given.shape)} in the checkpoint and {tuple(own.shape)} in the "
                f"{type(module).__name__}: channels were removed. Allowed: PruningCallback(..., resume_from=) with "
                "this checkpoint"
            )


def tell_of_best(known: list[str]) -> None:
    """Warn where something had a best, once in a removal.

    Args:
        known: who had one.
    """
    if known:
        logger.warning(
            "best: channels were removed, so the earlier best score no longer applies (%s)", ", ".join(known)
        )


def write_state(pruner: Pruning, folder: str | Path) -> None:
    """Write the pruner's state into a checkpoint's folder, on the first process."""
    state = pruner.state_dict()
    if rank() == 0:
        write_atomically(Path(folder) / STATE, lambda path: torch.save(state, path))


def read_state(folder: str | Path) -> dict[str, Any]:
    """The pruner's state in a checkpoint's folder.

    Raises:
        CheckpointError: the state is missing or damaged.
    """
    path = Path(folder) / STATE
    if not path.is_file():
        raise CheckpointError(
            f"resume_from: {str(folder)!r} holds no {STATE}. Allowed: a checkpoint of such a training"
        )
    return read_torch_mapping(path, "resume_from")


def forget_hooks(copy: nn.Module) -> None:
    """Take the library's hooks out of a copy of a pruned model; they came along, and a pickle of it would need them."""
    own = __name__.partition(".")[0]
    for module in copy.modules():
        for name, hooks in vars(module).items():
            if name.endswith("_hooks") and isinstance(hooks, dict):
                for key in [key for key, hook in hooks.items() if _origin(hook).partition(".")[0] == own]:
                    del hooks[key]


def _origin(hook: Any) -> str:
    """The module that a hook is defined in."""
    hook = getattr(hook, "hook", hook)
    return str(getattr(hook, "__module__", None) or type(hook).__module__)
