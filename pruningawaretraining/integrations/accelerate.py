"""``PruningCallback`` for training loops with Accelerate."""

from __future__ import annotations

from typing import Any

from torch import nn

from pruningawaretraining.inputs import ForwardFn
from pruningawaretraining.integrations.common import Attached, imported, read_state, wrappers_of, write_state
from pruningawaretraining.processes import rewrap_in_place
from pruningawaretraining.pruning import Pruning, Source


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
        ConfigError: accelerate is not installed.
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
        self.pruner: Pruning = Attached(config, example_inputs, forward_fn, ema, teacher).make(model)
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
        """Prune what is due after an epoch.

        Args:
            model: as ``accelerator.prepare`` has given it; its wrapper is made anew where channels have gone.
            epoch: counted from 0.
        """
        self.pruner.prune(model, epoch)
        rewrap_in_place(model)

    def _save(self, models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        write_state(self.pruner, output_dir)

    def _load(self, models: list[nn.Module], input_dir: str) -> None:
        self.pruner.load_state_dict(read_state(input_dir))
        for wrapped in wrappers_of(self.pruner.model):
            rewrap_in_place(wrapped)
