"""``PruningCallback`` for training loops with Accelerate."""

from __future__ import annotations

import logging
import weakref
from typing import Any

from torch import nn

from pruningawaretraining.distributed.ddp import rewrap_in_place
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.integrations.common import Attached, imported, read_state, write_state
from pruningawaretraining.models.calling import ForwardFn, unwrap
from pruningawaretraining.models.wrappers import wrappers_of
from pruningawaretraining.session.pruning import Pruning, Source

logger = logging.getLogger(__name__)
_LAST: weakref.WeakKeyDictionary[Any, weakref.ref[PruningCallback]] = weakref.WeakKeyDictionary()


class PruningCallback:
    """Prunes a model while a loop with Accelerate trains it; made before ``accelerator.prepare``.

    ``accelerator.save_state`` writes the pruner's state too, and ``accelerator.load_state`` brings a newly built model
    to the architecture of the checkpoint before its weights are loaded.

    Args:
        accelerator: the loop's.
        model: the model, not prepared yet.
        config: as for :class:`~pruningawaretraining.Pruning`.
        example_inputs, forward_fn, ema, teacher: likewise.

    Raises:
        ConfigError: accelerate is not installed, the first two arguments are something else, the model is prepared
            already, or another callback prunes it.
    """

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        config: Source,
        example_inputs: Any = None,
        forward_fn: ForwardFn | None = None,
        ema: nn.Module | list[nn.Module] | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        imported("accelerate", "accelerate")
        _check_arguments(accelerator, model)
        attached = Attached(config, example_inputs, forward_fn, ema, teacher)
        last = _LAST[accelerator]() if accelerator in _LAST else None
        if last is not None and last.pruner.model is unwrap(model):
            raise ConfigError(
                f"model: this {type(model).__name__} has a PruningCallback already. Allowed: one, with all rules in "
                "its config"
            )
        self.pruner: Pruning = attached.make(model)
        self.pruner.best_begins_anew = False  # the loop is the user's
        attached.release()  # the state comes before the weights
        if last is not None:
            logger.warning("accelerator: its checkpoints hold the pruner of the %s from here on", type(model).__name__)
            for handle in last._handles:
                handle.remove()
        self._handles: list[Any] = [
            accelerator.register_save_state_pre_hook(self._save),
            accelerator.register_load_state_pre_hook(self._load),
        ]
        _LAST[accelerator] = weakref.ref(self)

    def on_epoch_end(self, model: nn.Module, epoch: int) -> str | None:
        """Prune what is due after an epoch.

        Args:
            model: as ``accelerator.prepare`` has given it; its wrapper is made anew where channels have gone.
            epoch: counted from 0.

        Returns:
            "removed", "masked", or None where nothing has happened; begin a best metric anew once channels have gone.
        """
        done = self.pruner.prune(model, epoch)
        rewrap_in_place(model)
        return done

    def _save(self, models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        write_state(self.pruner, output_dir)

    def _load(self, models: list[nn.Module], input_dir: str) -> None:
        self.pruner.load_state_dict(read_state(input_dir))
        for wrapped in wrappers_of(self.pruner.model):
            rewrap_in_place(wrapped)


def _check_arguments(accelerator: Any, model: Any) -> None:
    order = "Allowed: PruningCallback(accelerator, model, config, example_inputs)"
    if not hasattr(accelerator, "register_save_state_pre_hook"):
        raise ConfigError(f"accelerator: {type(accelerator).__name__} is not an Accelerator. {order}")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: {type(model).__name__} is not a module. {order}")
    if any(getattr(one, "_is_accelerate_prepared", False) for one in (model, unwrap(model))):
        raise ConfigError(
            f"model: accelerator.prepare has had this {type(model).__name__} already. Allowed: make the "
            "PruningCallback before it"
        )
