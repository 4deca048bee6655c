"""The moment at which an event has happened: an exception before it leaves the books as they were, one after it changes
nothing any more. Exceptions are of any kind, KeyboardInterrupt and a full memory among them.

What an event has masked by then may stay 0, and is in the books if it was all of it; prune of the same epoch takes the
event once more. Where the weights that stay were moved as well (compensation, second order), they go back too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from pruningawaretraining.criteria.second_order import Calibration, Sampling
from pruningawaretraining.engine.context import RemovalContext
from pruningawaretraining.engine.coupled import CoupledGroups
from pruningawaretraining.engine.observing import Observing
from pruningawaretraining.engine.rule import ActiveRule
from pruningawaretraining.engine.weights import WeightGroups
from pruningawaretraining.errors import PruningError
from pruningawaretraining.masks.masks import Masks


class Commit:
    """The books of one rule around an event.

    Args:
        rule: the rule, or None for a change that no rule has asked for.
    """

    def __init__(self, rule: ActiveRule | None = None) -> None:
        self._rule, self._final = rule, None if rule is None else rule.state
        self.met, self.done = False, False

    def __call__(self) -> None:
        """The event has happened: the rule is what it is after it."""
        if self.is_over:
            return
        if self._rule is not None:
            settled = self._rule.settled(self.met)
            self._final = settled
            self._rule.state = settled
        self.done = True

    @property
    def is_over(self) -> bool:
        """Whether the event has happened."""
        return self.done if self._rule is None else self._rule.state is self._final


class HasMasks(Protocol):
    """An engine, as far as its masks go."""

    model: nn.Module
    coupled: CoupledGroups | None
    weights: WeightGroups | None
    calibration: Calibration | None

    @property
    def masks(self) -> list[Masks]:
        """Every mask that acts in a step."""


@contextmanager
def event_of(engine: HasMasks, one: ActiveRule, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[Commit]:
    """Around an event of a rule; what it gives is called once masks, and what is removed with them, are put."""
    before = (replace(one.state), one.next_G, one.scores_G, one.gradient_G)
    tensors, keep_D = _moving(engine, one), None if engine.coupled is None else engine.coupled.keep_D
    keeps = [each.keep_G for each in engine.masks]
    commit = Commit(one)
    one.state = replace(one.state)
    try:
        yield commit
    except BaseException as error:
        if not commit.is_over:
            one.state, one.next_G, one.scores_G, one.gradient_G = before
            if tensors and len(keeps) == len(engine.masks):
                _put_back(engine, tensors, keep_D, keeps)
            if not isinstance(error, PruningError):  # what raises these leaves masks whole
                _mask_again(engine, optimizers)
        raise


def leave_member(engine: Observing, one: ActiveRule, context: RemovalContext) -> None:
    """An event begins: the fine-tuning of a family's member is over. Tell it, with the model as the member is.

    Args:
        engine: observes nothing meanwhile.
        one: the rule.
        context: knows whom to tell.
    """
    if one.state.holds:
        one.complete()
        with engine.paused():
            context.member_done()
    one.state.holds, one.state.waiting = False, None


def _moving(engine: HasMasks, one: ActiveRule) -> list[tuple[Tensor, Tensor]]:
    """Each tensor of the model with a copy, where an event moves more than it masks."""
    if engine.calibration is None or not (one.compensates or isinstance(one.criterion, Sampling)):
        return []
    tensors = [*engine.model.parameters(), *engine.model.buffers()]
    return [(one, one.detach().clone()) for one in tensors]


@torch.no_grad()
def _put_back(
    engine: HasMasks, tensors: list[tuple[Tensor, Tensor]], keep_D: Tensor | None, keeps: list[Tensor]
) -> None:
    if engine.coupled is not None and keep_D is not None:
        engine.coupled.keep_D = keep_D
    for masks, keep_G in zip(engine.masks, keeps, strict=True):
        masks.set(keep_G)
    for tensor, values in tensors:
        tensor.copy_(values)


def _mask_again(engine: HasMasks, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Let masks act as they are noted: an exception may have come in the middle of it."""
    for masks in engine.masks:
        masks.apply()  # dense values that live on are kept aside
    if engine.coupled is not None:
        engine.coupled.masks.set(engine.coupled.keep_D[engine.coupled.live_D])
    for one in () if engine.weights is None else engine.weights.rules:
        one.masks.set(one.masks.keep_G)
    for masks in engine.masks:
        masks.apply_to_gradients()
        masks.apply_to_state(optimizers)
