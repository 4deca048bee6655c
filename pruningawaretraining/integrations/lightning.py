"""``PruningCallback`` for Lightning's Trainer, of the package ``lightning`` and of ``pytorch_lightning``."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.config.options import support_of
from pruningawaretraining.errors import CheckpointError, ConfigError, unknown
from pruningawaretraining.files import read_torch
from pruningawaretraining.integrations.common import Attached, imported, tell_of_best
from pruningawaretraining.models.calling import ForwardFn
from pruningawaretraining.models.private import keep_private, private_of
from pruningawaretraining.registry import build
from pruningawaretraining.session.arguments import given_averages
from pruningawaretraining.session.pruning import Pruning, Source
from pruningawaretraining.session.state_in import put_state_in

PACKAGES = {"lightning": "lightning.pytorch.callbacks", "pytorch_lightning": "pytorch_lightning.callbacks"}

AVERAGE = "_average_model"
"""Attribute of Lightning's WeightAveraging: the average of the LightningModule, once it has been made."""
BEFORE_LOADING = "_pruning_before_loading"
"""Where the part has what is done before weights are loaded: averages may be made after the pruner."""


def _bases() -> tuple[type, ...]:
    """The Callback of every package that is installed: a trainer of either takes the callback."""
    there = [module for name, module in PACKAGES.items() if importlib.util.find_spec(name) is not None]
    found = [imported(module, "lightning").Callback for module in there or PACKAGES.values()]
    return tuple(dict.fromkeys(found))


_Callbacks: Any = type("_Callbacks", _bases(), {})


class PruningCallback(_Callbacks):  # type: ignore[misc]
    """Prunes the model of a LightningModule while it is fitted.

    Checkpoints of the Trainer hold the pruner's state. To go on from one, name it here and in ``fit``::

        trainer = Trainer(callbacks=[PruningCallback(config, resume_from=path), ...])
        trainer.fit(module, ckpt_path=path)

    Args:
        config: as for :class:`~pruningawaretraining.Pruning`.
        example_inputs: likewise; without them the first batch of the part that is pruned shows them.
        part: name of the submodule that is pruned, such as "model"; "" for the LightningModule itself.
        forward_fn, ema, teacher: as for ``Pruning``. The average of a callback such as ``EMAWeightAveraging`` is found
            in the Trainer and follows.
        resume_from: a checkpoint of the Trainer.

    Raises:
        ConfigError: neither package is installed, or the config cannot be used.
        CheckpointError: the checkpoint cannot be read, or holds no pruner.
    """

    def __init__(
        self,
        config: Source,
        example_inputs: Any = None,
        part: str = "",
        forward_fn: ForwardFn | None = None,
        ema: nn.Module | list[nn.Module] | None = None,
        teacher: nn.Module | None = None,
        resume_from: str | Path | None = None,
    ) -> None:
        super().__init__()
        state = None if resume_from is None else _state_in(resume_from, self.state_key)
        given = [one for one in given_averages(ema) if isinstance(one, nn.Module) or not hasattr(one, AVERAGE)] or None
        self._attached = Attached(config, example_inputs, forward_fn, given, teacher, state)
        self._part = part
        self._restored = False  # whether fit has been given a checkpoint
        self._waiting: tuple[nn.Module, Any] | None = None  # the part, and the hook before weights are loaded

    @property
    def pruner(self) -> Pruning:
        """The pruner, once ``fit`` has begun."""
        return self._attached.pruner

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Make the pruner, before weights are loaded and the strategy wraps the model.

        Raises:
            ConfigError: an unknown part, or none given for a LightningModule without forward.
        """
        if stage == "fit":
            self._restored = False
            part = self._part_of(pl_module)
            self._release()
            keep_private(part, BEFORE_LOADING, partial(self._follow_averages, trainer))
            hook: Any = part.register_load_state_dict_pre_hook  # before the pruner's own
            self._waiting = part, hook(_before_loading)
            self._attached.make(part, self._averages(trainer))
            self._follow_averages(trainer)

    def _averages(self, trainer: Any) -> list[nn.Module]:
        """The copies of the part in the averages that other callbacks have made of the LightningModule."""
        found: list[Any] = [getattr(one, AVERAGE, None) for one in trainer.callbacks]
        return [one.module.get_submodule(self._part) for one in found if one is not None]

    def _follow_averages(self, trainer: Any) -> None:
        """Averages follow; with their weights, which take the place of the model's in checkpoints, the pruner's state
        is written, too."""
        for one in self._averages(trainer):
            self.pruner.attach_ema(one)
            put_state_in(one, self.pruner)

    def _release(self) -> None:
        """Nothing has to be done before weights are loaded any more."""
        if self._waiting is not None:
            part, handle = self._waiting
            handle.remove()
            keep_private(part, BEFORE_LOADING, None)
            self._waiting = None

    def _part_of(self, pl_module: Any) -> nn.Module:
        modules = dict(pl_module.named_modules())
        depth = self._part.count(".")
        near = [name for name in modules if name and name.count(".") <= depth]
        if self._part not in modules:
            raise ConfigError(f"part: {unknown('submodule', self._part, near)}")
        base: Any = next(one for one in type(pl_module).__mro__ if one.__name__ == "LightningModule")
        rules = [one for one in self._attached.config.rules if one.enabled]
        traced = any(support_of(build("pattern", one.pattern)).removable for one in rules)
        plain = self._part == "" and type(pl_module).forward is base.forward and self._attached.forward_fn is None
        if traced and plain:
            raise ConfigError(
                f"part: '' is the {type(pl_module).__name__} itself, which has no forward to trace channels with. "
                f"Allowed: part= one of {', '.join(near)}, a forward of the LightningModule, or forward_fn="
            )
        part: nn.Module = modules[self._part]
        return part

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Take part in the optimizers' steps."""
        self._release()
        self._follow_averages(trainer)
        for optimizer in trainer.optimizers:
            self.pruner.attach(optimizer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Training begins, with the checkpoint's weights where there are any.

        Raises:
            CheckpointError: ``resume_from`` was given, and ``fit`` has no checkpoint.
            ConfigError: another callback prunes the same model.
        """
        if self._attached.state is not None and not self._restored:
            raise CheckpointError(
                "resume_from: the model has the checkpoint's architecture and not its weights: fit was given no "
                "checkpoint. Allowed: trainer.fit(module, ckpt_path=), with the same path"
            )
        batches = trainer.num_training_batches
        self._attached.begin(int(batches // trainer.accumulate_grad_batches) if math.isfinite(batches) else None)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.pruner.on_step_begin(batch_idx)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Before clipping: masked gradients are 0."""
        self.pruner.on_before_optimizer_step()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Prune; checkpoints of the epoch are written after it."""
        if self._attached.epoch_ended(trainer.strategy.model, trainer.current_epoch):
            _begin_best_anew(trainer.callbacks)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.pruner.on_train_end()

    def state_dict(self) -> dict[str, Any]:
        """The pruner's state, for the Trainer's checkpoints."""
        return self.pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Weights have been loaded by now, so the state must have come before; see ``resume_from``.

        Raises:
            CheckpointError: the training is gone on with, and ``resume_from`` was not given.
        """
        self._restored = True
        if not self._attached.resumed:
            raise CheckpointError(
                "callback: the checkpoint is of a pruned training. Allowed: PruningCallback(..., resume_from=ckpt_path)"
            )


def _before_loading(module: nn.Module, *_: Any) -> None:
    """Hook before ``load_state_dict``."""
    prepare = private_of(module, BEFORE_LOADING)
    if prepare is not None:
        prepare()


def _worst(callback: Any) -> Tensor:
    """The score that any other beats."""
    return torch.tensor(math.inf if callback.mode == "min" else -math.inf)


def _begin_best_anew(callbacks: list[Any]) -> None:
    """Channels have gone: what callbacks took for the best so far is of another model. Files that are there stay."""
    known = []
    for one in callbacks:
        if getattr(one, "best_k_models", None):  # ModelCheckpoint
            known.append(type(one).__name__)
            one.best_k_models, one.kth_best_model_path = {}, ""
            one.kth_value = _worst(one)
            one.best_model_path, one.best_model_score = "", None
        elif isinstance(getattr(one, "best_score", None), Tensor) and hasattr(one, "wait_count"):  # EarlyStopping
            known.append(type(one).__name__)
            one.wait_count, one.best_score = 0, _worst(one)
    tell_of_best(known)


def _state_in(path: str | Path, key: str) -> Mapping[str, Any]:
    """The callback's state in a checkpoint of the Trainer."""
    checkpoint = read_torch(path, "resume_from")
    try:
        found: Mapping[str, Any] = checkpoint["callbacks"][key]
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"resume_from: {str(path)!r} holds no {key}. Allowed: one of such a training") from error
    return found
