"""Events in parts: the masks of one event are taken step by step until the next, lowest scores first.

Shape suffixes: ``_G`` groups of one rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pruningawaretraining.allocation.threshold import progressive
from pruningawaretraining.engine.context import RemovalContext
from pruningawaretraining.engine.domain import Domain
from pruningawaretraining.engine.rule import ActiveRule


def advance(domain: Domain, one: ActiveRule, now: int, context: Callable[[], RemovalContext]) -> None:
    """Mask the parts that are due by now.

    Args:
        domain: of the rule.
        one: the rule.
        now: the epoch or step.
        context: gives what follows a mask.
    """
    if one.next_G is None or one.scores_G is None or one.state.begun is None:
        return
    part = int((now - one.state.begun) * one.parts // one.rule.every) + 1
    if part >= one.parts:
        complete(domain, one, context())
    elif part > one.state.part:
        left, going = one.parts - one.state.part, part - one.state.part
        keep_G = domain.keep_of(one)
        next_G, scores_G = one.next_G.to(keep_G.device), one.scores_G.to(keep_G.device)
        one.state.part = part
        domain.mask(one, progressive(keep_G, next_G, scores_G, going, left), context().optimizers)


def complete(domain: Domain, one: ActiveRule, context: RemovalContext) -> None:
    """Take the parts that are left."""
    if one.next_G is not None:
        keep_G = one.next_G
        settle(one)
        domain.mask(one, keep_G, context.optimizers)


def complete_all(domains: Iterable[Domain], context: Callable[[], RemovalContext]) -> None:
    """Take the parts that are left of every rule, and settle what masked weights are: 0 from now on."""
    for domain in domains:
        for one in domain.rules:
            complete(domain, one, context())
        domain.settle()


def settle(one: ActiveRule) -> None:
    """No part of an event is left."""
    one.next_G = one.scores_G = one.state.begun = None
    one.state.part = 0
