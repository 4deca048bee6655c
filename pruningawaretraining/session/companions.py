"""The part of the facade for what trainers keep beside the model: checkpoints, averages and wrappers."""

from __future__ import annotations

from typing import Any

from torch import nn

from pruningawaretraining.distributed.ddp import rewrap_in_place
from pruningawaretraining.errors import ModelError
from pruningawaretraining.masks.averages import held_by, is_alike
from pruningawaretraining.session.arguments import followers_of, given_averages
from pruningawaretraining.session.averages import follower_for
from pruningawaretraining.session.bound import Bound
from pruningawaretraining.session.forgotten import forgotten_averages
from pruningawaretraining.session.state_in import StateHandle, put_state_in
from pruningawaretraining.session.takeover import others_of


class Companions(Bound):
    """Checkpoints, averages and wrappers of a trainer."""

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`pruningawaretraining.Pruning.state_dict`."""
        raise NotImplementedError

    def state_in(self, model: nn.Module | None = None) -> StateHandle:
        """Store the pruner's state in ``model.state_dict()``, so that a trainer's own checkpoints hold the run.

        ``model.load_state_dict`` gives the model the architecture of the checkpoint before its weights are loaded, its
        optimizers and averages included, and brings masks, phases and random generators back. So any trainer's own
        resume works, before and after a removal; attach the optimizer, and the average where there is one, before it.
        Weights without a pruner's state are loaded as always. A model without a pruner names the state as unexpected
        where loading is strict. Copies of the model neither write nor read it.

        Args:
            model: the model given at construction, or its wrapper.

        Returns:
            A handle whose ``remove()`` takes the state out again.

        Raises:
            ModelError: another model. Loading raises CheckpointError where the state is damaged or does not fit.
        """
        self._check_same(model)
        return put_state_in(self._session.model, self)  # type: ignore[arg-type]

    def attach_ema(self, average: Any) -> None:
        """Make a moving average that was created after the pruner follow masks and removals, as with ``ema=``.

        Args:
            average: a module, an object that has one as ``.ema`` or ``.module``, or several; of the model, or of a
                module that the model is a part of.

        Raises:
            ConfigError: it is none of these.
            ModelError: it holds no copy of the model as it is now, or several.
        """
        followers_of(average)
        for given in given_averages(average):
            module = follower_for(given, self._session.model)
            if not any(is_alike(one, self._session.model) for one in held_by(module)):
                raise ModelError(
                    f"ema: {type(given).__name__} holds no copy of the {type(self._session.model).__name__} as it is "
                    "now. Allowed: an average that is made from it, after any removal"
                )
            self._session.averages.add(given)
        for masks in self._session.engine.masks:
            masks.set(masks.keep_G)

    def _follow_forgotten(self) -> None:
        """Let averages follow that the training loop has and the pruner was not given."""
        model = self._session.model
        for other in others_of(model, self):
            if strange := [one for one in other.followers if one not in self.followers]:
                self.attach_ema(strange)
        found = forgotten_averages(model, self._session.followers)
        if found:
            self.attach_ema(found)

    def rewrap(self, wrapped: nn.Module) -> nn.Module:
        """Rebuild a DistributedDataParallel with its options, after channels have been removed.

        ``ddp_model = pruner.rewrap(ddp_model)`` after ``pruner.prune`` costs nothing while no parameter has been
        exchanged. The wrapper is rebuilt in place and returned, so other objects that hold it (a task, a saver) have
        the new one too. Every process has to call it.

        Args:
            wrapped: the model in its wrapper.

        Raises:
            ModelError: another model, or a wrapper whose options cannot be carried over.
        """
        self._check_same(wrapped)
        rewrap_in_place(wrapped)
        return wrapped
