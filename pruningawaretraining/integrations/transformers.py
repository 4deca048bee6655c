"""``PruningCallback`` for the Trainer of transformers."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sized
from pathlib import Path
from typing import Any

from torch import nn

from pruningawaretraining.distributed.ddp import rewrap_in_place
from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.integrations.common import STATE, Attached, imported, read_state, tell_of_best, write_state
from pruningawaretraining.models.calling import ForwardFn
from pruningawaretraining.models.wrappers import wrappers_of
from pruningawaretraining.session.pruning import Pruning, Source

logger = logging.getLogger(__name__)

_TrainerCallback: Any = imported("transformers", "transformers").TrainerCallback


class PruningCallback(_TrainerCallback):  # type: ignore[misc]
    """Prunes the model of a Trainer while it trains.

    The pruner's state is written into every checkpoint. To go on from one, name it here and in ``train``::

        trainer = Trainer(..., callbacks=[PruningCallback(config, inputs, resume_from=folder)])
        trainer.train(resume_from_checkpoint=folder)

    Args:
        config: as for :class:`~pruningawaretraining.Pruning`.
        example_inputs: likewise, usually a dict of keyword inputs.
        forward_fn, ema, teacher: as for ``Pruning``.
        resume_from: a checkpoint's folder.

    Raises:
        ConfigError: transformers is not installed, or the config cannot be used.
        CheckpointError: the folder holds no state of a pruner.
    """

    def __init__(
        self,
        config: Source,
        example_inputs: Any = None,
        forward_fn: ForwardFn | None = None,
        ema: nn.Module | list[nn.Module] | None = None,
        teacher: nn.Module | None = None,
        resume_from: str | Path | None = None,
    ) -> None:
        state = None if resume_from is None else read_state(resume_from)
        self._attached = Attached(config, example_inputs, forward_fn, ema, teacher, state)
        self._training: weakref.ref[Any] | None = None  # the state of the training that has begun last

    @property
    def pruner(self) -> Pruning:
        """The pruner, once the Trainer has been made."""
        return self._attached.pruner

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Make the pruner, before the Trainer makes its optimizer and loads weights."""
        if model is not None:
            self._attached.make(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take part in the optimizer's steps.

        Raises:
            CheckpointError: only one of ``resume_from`` and ``resume_from_checkpoint`` was given.
            ConfigError: the callback is given twice, or another one prunes the same model.
        """
        if self._training is not None and self._training() is state:
            raise ConfigError("callbacks: this PruningCallback is given twice. Allowed: once")
        self._training = weakref.ref(state)
        self._check_resumed(Path(args.output_dir), state.global_step)
        self._attached.make(model)
        optimizer = kwargs.get("optimizer")
        if optimizer is not None:
            self.pruner.attach(optimizer)
        loader = kwargs.get("train_dataloader")
        steps = len(loader) // max(1, args.gradient_accumulation_steps) if isinstance(loader, Sized) else None
        self._attached.begin(steps)

    def _check_resumed(self, folder: Path, step: int) -> None:
        """Weights and the pruner's state are of the same checkpoint, or neither is of any."""
        if self._attached.state is not None and step == 0:
            raise CheckpointError(
                "resume_from: the model has the checkpoint's architecture and not its weights: train was given no "
                "checkpoint. Allowed: trainer.train(resume_from_checkpoint=), with the same folder"
            )
        if not self._attached.resumed and step > 0:
            where = folder / f"checkpoint-{step}"
            if (where / STATE).is_file():
                raise CheckpointError(
                    f"resume_from: the training resumes at step {step}, and the callback has no state. Allowed: "
                    f"PruningCallback(..., resume_from={str(where)!r})"
                )
            logger.warning("resume_from: the training resumes at step %d, and the pruner starts from scratch", step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.pruner.on_step_begin(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.pruner.on_before_optimizer_step()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Prune; a checkpoint of the epoch is written after it."""
        if self.pruner.prune(None, max(0, round(state.epoch) - 1)) == "removed" and state.best_metric is not None:
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
            tell_of_best(["TrainerState"])
        for wrapped in wrappers_of(self.pruner.model):
            rewrap_in_place(wrapped)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add the pruner's state to the checkpoint that the Trainer has just written."""
        write_state(self.pruner, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.pruner.on_train_end()
