"""Which pruner is at work on a model: there is one at a time."""

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

    def follow_other(self) -> None: ...


ATTRIBUTE = "_pruning_pruner"


def take_over(model: nn.Module, pruner: AtWork) -> weakref.ref[AtWork] | None:
    """Be the pruner of a model: an earlier one that has not begun yet retires, as after a notebook's second run.

    Returns:
        The earlier one, if there is one: what it has masked stays so.

    Raises:
        ModelError: the earlier one is at work.
    """
    known: weakref.ref[AtWork] | None = private_of(model, ATTRIBUTE)
    earlier = known() if known is not None else None
    if earlier is not None and earlier.is_active and earlier.phase in ("regularize", "prune"):
        if earlier.has_begun:
            raise ModelError(
                f"model: another Pruning is at work on this {type(model).__name__}, phase {earlier.phase!r}. "
                "Allowed: all rules in one config, or first end the other: on_train_end()"
            )
        earlier.on_train_end()
        logger.warning("model: an earlier Pruning of it is retired: it had not started")
    keep_private(model, ATTRIBUTE, weakref.ref(pruner))
    return known


def leave_to(model: nn.Module, earlier: weakref.ref[AtWork] | None) -> None:
    """Be its pruner no more, since none could be made: the one that was there before is."""
    keep_private(model, ATTRIBUTE, earlier or (lambda: None))
