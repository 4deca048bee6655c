"""The phase of an epoch, by what happened in it."""

from __future__ import annotations

from pruningawaretraining.session.pruning import Pruning


class EpochPhase:
    """Names one epoch: "prune" if groups were masked or removed in it, else the pruner's phase when it began.

    Args:
        pruner: of the model; None for one that is only trained.
        known: the name so far, of an epoch that was interrupted.
    """

    def __init__(self, pruner: Pruning | None, known: str | None = None) -> None:
        self._pruner = pruner
        self._began = known or ("train" if pruner is None else pruner.phase)
        self._before = self._events()

    @property
    def name(self) -> str:
        """The name, by what has happened until now."""
        return "prune" if self._events() > self._before else self._began

    def _events(self) -> int:
        return 0 if self._pruner is None else sum(one.state.event for one in self._pruner.engine.rules)
