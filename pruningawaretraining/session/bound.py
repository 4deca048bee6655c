"""The base of the facade: it is bound to a session once it has a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

from pruningawaretraining.engine.books import StepWatch, settle
from pruningawaretraining.engine.other_removals import follow_removed
from pruningawaretraining.errors import ModelError, PruningError
from pruningawaretraining.models.calling import outside_inference, unwrap
from pruningawaretraining.models.wrappers import remind_of_rewrap
from pruningawaretraining.session.arguments import check_model
from pruningawaretraining.session.optimizer_hooks import Steps
from pruningawaretraining.session.session import Session
from pruningawaretraining.session.takeover import others_of


@dataclass
class NoChannels:
    """A stand-in for ``channel_pruner`` where no rule prunes channels: loops that read its flag go on."""

    reset_optimizer: bool = False


class Bound:
    """Holds the session of a pruner.

    Attributes:
        best_begins_anew: set it where the loop begins its best metric anew when ``prune`` returns "removed", or keeps
            no best checkpoint; no warning is given then.
        state_was_loaded: whether the state has come back with the model's weights; see ``state_in``.
    """

    def __init__(self) -> None:
        self.best_begins_anew = self.state_was_loaded = False
        self._known: Session | None = None
        self._says_before = False  # whether the loop calls on_before_optimizer_step
        self._watch = StepWatch()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse ``copy`` and ``pickle``: hooks act on this pruner's own model and optimizers, and would stay behind.

        Raises:
            PruningError: always.
        """
        raise PruningError(
            f"{type(self).__name__}: a pruner cannot be copied or pickled: it acts on its own model and optimizers. "
            "Allowed: copy those, then new = Pruning(model, pruner.config, optimizer=...) on a dense model and "
            "new.load_state_dict(pruner.state_dict())"
        )

    @property
    def _session(self) -> Session:
        if self._known is None:
            raise ModelError("model: the pruner was made without one; assign it first: pruner.model = model")
        return self._known

    @property
    def _steps(self) -> Steps:
        return self._session.steps

    def _settle(self) -> None:
        """See :meth:`pruningawaretraining.Pruning.apply_masks`."""
        session = self._session
        with outside_inference():
            session.follow_shards()
            settle(session.engine, session.steps.optimizers, session.sharded)
            session.writes.forget()

    @property
    def followers(self) -> list[nn.Module]:
        """The averages that follow the model."""
        return [] if self._known is None else list(self._known.followers)

    def follow_other(self) -> None:
        """Another pruner has removed channels: masks, averages and statistics follow."""
        if self._known is not None:
            follow_removed(self._known.engine, self._known.steps.optimizers, self._known.ended)
            self._known.writes.forget()

    def _follow_on(self) -> None:
        """Channels have gone: tell the other pruners of the model, and outdated wrappers."""
        remind_of_rewrap(self._session.model)
        for other in others_of(self._session.model, self):
            other.follow_other()

    def _check_same(self, model: nn.Module | None) -> None:
        own = self._session.model
        if model is None:
            return
        check_model(model)
        if unwrap(model) is not own:
            raise ModelError(
                f"model: this {type(model).__name__} is not the {type(own).__name__} that the pruner was made for"
            )
