"""``PruningCallback`` for ultralytics' YOLO models. The package is never imported: its objects come as arguments."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.distributed.ddp import rewrap_in_place
from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.integrations.common import Attached, forget_hooks
from pruningawaretraining.models.calling import unwrap
from pruningawaretraining.session.pruning import Pruning, Source
from pruningawaretraining.session.state_in import packed, unpacked

logger = logging.getLogger(__name__)

STATE = "pruner_state"
"""Attribute of the average in ``last.pt`` and ``best.pt`` that holds the pruner's state: a tensor of bytes."""


class PruningCallback:
    """Prunes a YOLO model while ultralytics' trainer trains it.

    ``PruningCallback("pruning.yaml").add_to(model)``, then ``model.train(...)`` as always. Example inputs are made from
    ``imgsz``. The average follows, the lists it keeps are cleared, the best fitness begins anew when channels go, and
    ``last.pt`` and ``best.pt`` hold the pruner's state. To go on from one::

        model = YOLO("runs/detect/train/weights/last.pt")
        callback = PruningCallback("pruning.yaml").add_to(model)
        model.train(resume=True, trainer=callback.trainer(model))

    ultralytics builds the dense model anew from the model's YAML when it resumes or trains a file further; the trainer
    of :meth:`trainer` brings it to the architecture of the file before the weights are loaded.

    Args:
        config: as for :class:`~pruningawaretraining.Pruning`.
        example_inputs: likewise; without them one image of ``imgsz``.

    Raises:
        ConfigError: the config cannot be used.
    """

    def __init__(self, config: Source, example_inputs: Any = None) -> None:
        self._config, self._inputs = Attached(config).config, example_inputs
        self._attached: Attached | None = None
        self._from_pruned = False  # whether it was added to the model of a file whose channels have gone
        self._added_to: Callable[[], Any] = _nothing

    def __getstate__(self) -> dict[str, Any]:
        """For the processes that ultralytics starts: without the object that it was added to."""
        return {**vars(self), "_added_to": _nothing}

    @property
    def pruner(self) -> Pruning:
        """The pruner, once the trainer has the model.

        Raises:
            ConfigError: it has not yet.
        """
        return (self._attached or Attached(self._config)).pruner

    def add_to(self, model: Any) -> PruningCallback:
        """Take part in the training of a YOLO object, or of a trainer.

        Raises:
            ConfigError: it takes no callbacks.
        """
        if not hasattr(model, "add_callback"):
            raise ConfigError(
                f"model: a {type(model).__name__} takes no callbacks. Allowed: a YOLO object of ultralytics"
            )
        for event in ("on_pretrain_routine_start", "on_pretrain_routine_end", "on_train_epoch_end", "on_train_end"):
            call = getattr(self, event)
            if call not in model.callbacks.get(event, ()):
                model.add_callback(event, call)
        self._from_pruned, self._added_to = _lost_channels(model), weakref.ref(model)
        return self

    def trainer(self, model: Any) -> type[Any]:
        """The trainer of the model's task, which builds pruned files as they are; for ``model.train(trainer=...)``."""
        base: type[Any] = model.task_map[model.task]["trainer"]
        callback = self

        def get_model(self: Any, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
            state = getattr(weights, STATE, None)
            built: nn.Module = base.get_model(self, cfg, None if state is not None else weights, verbose)
            if state is not None:
                callback._make(self, built).load_state_dict(unpacked(state))
                built.load(weights)  # type: ignore[operator]
            return built

        return type(f"Pruning{base.__name__}", (base,), {"get_model": get_model, "__module__": __name__})

    # --- events -------------------------------------------------------------------------------------------------

    def on_pretrain_routine_start(self, trainer: Any) -> None:
        """Before the model is built; warns where a pruned file would become a dense model without a word.

        Raises:
            CheckpointError: the training goes on from a file, and the trainer is not that of :meth:`trainer`.
        """
        self._attached = None
        if type(trainer).__module__ == __name__:
            return
        if getattr(trainer, "resume", False):
            raise CheckpointError(
                "resume: ultralytics rebuilds the dense model. Allowed: model.train(resume=True, "
                "trainer=callback.trainer(model))"
            )
        if self._from_pruned or _lost_channels(self._added_to()):
            logger.warning(
                "model: the file's model has lost channels; ultralytics builds the dense model anew, leaves out "
                "weights of other shapes, and pruning starts again. To train the pruned model further: "
                "model.train(..., trainer=callback.trainer(model))"
            )

    def on_pretrain_routine_end(self, trainer: Any) -> None:
        """Model, optimizer and average are there."""
        model = unwrap(trainer.model)
        pruner = self._make(trainer, model)
        pruner.attach(trainer.optimizer)
        if trainer.ema is not None:
            forget_hooks(trainer.ema.ema)  # it is pickled whole
            pruner.attach_ema(trainer.ema)
        assert self._attached is not None
        self._attached.begin()

    def on_train_epoch_end(self, trainer: Any) -> None:
        """Prune before the epoch is validated and saved; a removal resets the best fitness, as the model is another."""
        pruner = self.pruner
        if pruner.prune(None, trainer.epoch) == "removed":
            rewrap_in_place(trainer.model)
            had = trainer.best_fitness
            trainer.best_fitness = None
            stopper = getattr(trainer, "stopper", None)
            if stopper is not None:
                stopper.best_fitness, stopper.best_epoch = 0.0, trainer.epoch
            if had is not None:
                logger.warning(
                    "best.pt: channels were removed, so the earlier best fitness (%.4g) no longer applies", had
                )
        if trainer.ema is not None:
            setattr(trainer.ema.ema, STATE, packed(pruner.state_dict()))

    def on_train_end(self, trainer: Any) -> None:
        self.pruner.on_train_end()

    def _make(self, trainer: Any, model: nn.Module) -> Pruning:
        """The pruner of the trainer's model, made once."""
        if self._attached is None:
            inputs = _image(trainer, model) if self._inputs is None else self._inputs
            self._attached = Attached(self._config, inputs, first_output)
        pruner = self._attached.make(model)
        self._attached.release()
        return pruner


def _nothing() -> None:
    """In place of a reference to an object that is not there."""


def _lost_channels(yolo: Any) -> bool:
    """Whether the model of a YOLO object comes from a file that says that channels have gone."""
    state = getattr(getattr(yolo, "model", None), STATE, None)
    channels = None if state is None else unpacked(state).get("channels")
    return channels is not None and bool(channels["removed"].any())


def first_output(model: nn.Module, inputs: Any) -> Any:
    """The predictions: in eval mode YOLO models also give what the loss is made of."""
    outputs = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


def _image(trainer: Any, model: nn.Module) -> Tensor:
    """One image of the size that is trained with."""
    size = trainer.args.imgsz
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    first = next(one for one in model.parameters() if one.dim() == 4)
    return torch.rand(1, first.shape[1], height, width, device=first.device, dtype=first.dtype)
