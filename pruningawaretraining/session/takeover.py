"""Which pruners a model has: one is at work at a time, and the others follow what it removes."""

from __future__ import annotations

import logging
import weakref
from typing import Protocol

from torch import nn

from pruningawaretraining.errors import ModelError
from pruningawaretraining.models.private import keep_private, private_of

logger = logging.getLogger(__name__)


class AtWork(Protocol):
    """A pruner, as far as it matters to another one."""

    @property
    def phase(self) -> str: ...

    @property
    def has_begun(self) -> bool: ...

    @property
    def is_active(self) -> bool: ...

    def on_train_end(self) -> None: ...

    @property
    def followers(self) -> list[nn.Module]: ...

    def follow_other(self) -> None: ...


ATTRIBUTE = "_pruning_pruner"


def take_over(model: nn.Module, pruner: AtWork) -> list[weakref.ref[AtWork]]:
    """Be the pruner of a model: an earlier one that has not begun yet retires, as after a notebook's second run.

    Returns:
        Those that there were before: what they have masked stays so. They follow the removals of all others.

    Raises:
        ModelError: an earlier one is at work.
    """
    known: list[weakref.ref[AtWork]] = private_of(model, ATTRIBUTE) or []
    for earlier in others_of(model, pruner):
        if not earlier.is_active or earlier.phase not in ("regularize", "prune"):
            continue
        if earlier.has_begun:
            raise ModelError(
                f"model: another Pruning is at work on this {type(model).__name__}, phase {earlier.phase!r}. "
                "Allowed: all rules in one config, or first end the other: on_train_end()"
            )
        earlier.on_train_end()
        logger.warning("model: an earlier Pruning of it is retired: it had not started")
    keep_private(model, ATTRIBUTE, [*(one for one in known if one() is not None), weakref.ref(pruner)])
    return known


def others_of(model: nn.Module, pruner: object) -> list[AtWork]:
    """The pruners of a model beside this one, of those that are still alive."""
    known = [one() for one in private_of(model, ATTRIBUTE) or ()]
    return [one for one in known if one is not None and one is not pruner]


def leave_to(model: nn.Module, earlier: list[weakref.ref[AtWork]]) -> None:
    """Be its pruner no more, since none could be made: those that were there before are."""
    keep_private(model, ATTRIBUTE, earlier)
