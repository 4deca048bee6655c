"""Moving averages of the model: what is given as one, and whether it still follows once channels have gone.

Some averages keep lists of tensors. A removal exchanges tensors of the average too, and the lists then hold the old
ones: the average updates what nobody reads. Known lists are cleared; others show in tensors that were exchanged and are
not written to any more while the rest of the average is. PyTorch counts writes on the host, so looking is free.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pruningawaretraining.errors import ModelError
from pruningawaretraining.masks.averages import copies_inside, held_by, is_alike, is_near
from pruningawaretraining.models.private import keep_private

logger = logging.getLogger(__name__)

CACHES = ("_pairs",)
"""Lists of tensors that averages make anew where they are None: ultralytics' ModelEMA."""
FOLLOWS = "_pruner_follows"
"""Attribute of an average that follows a model for a pruner."""
LOOKED_AT = 8
"""Most tensors of each kind that are looked at."""

Write = tuple[Tensor, int]


def module_in(given: Any) -> nn.Module | None:
    """The module that is an average, or that a wrapper of an average holds; None if there is none."""
    return next(iter(held_by(given)), None)


def follower_for(given: Any, model: nn.Module) -> nn.Module | None:
    """What follows a model of what was given as its average: the module in it, or the copy of the model that is a part
    of that; None where there is no module.

    Raises:
        ModelError: several parts are copies of the model, and weights do not tell which is meant.
    """
    module = module_in(given)
    if module is None or any(is_alike(one, model) for one in held_by(module)):
        return module
    copies = copies_inside(module, model)
    near = {name: one for name, one in copies.items() if len(copies) == 1 or is_near(one, model)}
    if len(near) > 1:
        raise ModelError(
            f"ema: {type(given).__name__} holds several copies of the {type(model).__name__}: {', '.join(near)}. "
            "Allowed: one of them, as pruner.attach_ema(average.get_submodule(name))"
        )
    return next(iter(near.values()), module)


def _writes(module: nn.Module) -> dict[str, Write]:
    """Name -> tensor of floating dtype and how often it has been written to."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: (one, one._version) for name, one in named if one.is_floating_point() and not one.is_inference()}


@dataclass
class _Watch:
    """Looks whether an average goes on after a removal.

    Args:
        exchanged, others: names and tensors of the average: those that the removal has exchanged, and the rest.
        patience: steps after which an average that moves nowhere has stopped; None where that cannot be told.
    """

    exchanged: dict[str, Write]
    others: dict[str, Write]
    patience: int | None
    steps: int = 0

    def frozen(self, module: nn.Module) -> bool | None:
        """Whether the average has stopped; None while that is not known."""
        self.steps += 1
        if _moved(module, self.exchanged):
            return False
        if _moved(module, self.others):
            return True
        return True if self.patience is not None and self.steps > self.patience else None


def _moved(module: nn.Module, known: dict[str, Write]) -> bool:
    for name, (one, count) in known.items():
        owner, _, attribute = name.rpartition(".")
        now = getattr(module.get_submodule(owner), attribute, one)
        if now is not one or now._version != count:
            return True
    return False


@dataclass
class _Average:
    """One average: what was given, its module, and what is known of its writes."""

    given: Any
    module: nn.Module
    known: dict[str, Write] = field(default_factory=dict)
    since: int = 0
    watch: _Watch | None = None


class Averages:
    """The moving averages of a model.

    Args:
        given: modules, or objects that have one; of the model, or of a module that it is a part of.
        model: the model.
    """

    def __init__(self, given: Sequence[Any], model: nn.Module) -> None:
        self.modules: list[nn.Module] = []
        self._model = model
        self._all: list[_Average] = []
        self._steps = 0
        for one in given:
            self.add(one)

    def add(self, given: Any) -> None:
        """Follow one more; one that is known already is not followed twice."""
        module = follower_for(given, self._model)
        if module is None or any(known is module for known in self.modules):
            return
        self.modules.append(module)
        keep_private(module, FOLLOWS, True)
        self._all.append(_Average(given, module, _writes(module), self._steps))

    def removed(self) -> None:
        """Channels have gone: clear known lists, and look from here on whether each average goes on."""
        for one in self._all:
            for name in CACHES:
                if getattr(one.given, name, None) is not None:
                    setattr(one.given, name, None)
            before, now = one.known, _writes(one.module)
            exchanged = {name: now[name] for name in now if name not in before or before[name][0] is not now[name][0]}
            others = {name: now[name] for name in now if name not in exchanged}
            if exchanged:
                one.watch = _Watch(_few(exchanged), _few(others), self._patience(one))
            one.known, one.since = now, self._steps

    def _patience(self, one: _Average) -> int | None:
        """Three times as many steps as lay between writes before, for averages that had been written to."""
        writes = max((tensor._version - count for tensor, count in one.known.values()), default=0)
        return None if writes == 0 else 3 * ((self._steps - one.since) // writes + 1)

    def stepped(self) -> None:
        """A real step is over; the average of this step comes after it."""
        self._steps += 1
        for one in self._all:
            watch = one.watch
            frozen = None if watch is None else watch.frozen(one.module)
            if watch is None or frozen is None:
                continue
            one.watch = None
            if frozen:
                logger.warning(
                    "ema: %s does not follow the model any more: its tensors that were exchanged when channels went "
                    "have not changed in %d steps. It keeps lists of the old ones. Allowed: rebuild them when prune "
                    "returns 'removed', in pruner.after_removal; or give the object that has them as ema=",
                    type(one.given).__name__,
                    watch.steps,
                )


def _few(found: dict[str, Write]) -> dict[str, Write]:
    return dict(list(found.items())[:LOOKED_AT])
