"""Dynamics at work: masks between events, gradients for events that ask for them, going back, and their state.

Shape suffixes: ``_G`` groups of one rule.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.allocation.windows import allocate_windows, count_pruned
from pruningawaretraining.criteria.base import EXPECTED_MASKS, EXPECTED_SCORES, checked_masks, checked_scores
from pruningawaretraining.engine.rule import ActiveRule
from pruningawaretraining.engine.weight_rules import WeightRule
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.groups.lowest import counts_of
from pruningawaretraining.masks.dynamics import Dynamic, Event, top_of_sets
from pruningawaretraining.masks.masks import Masks
from pruningawaretraining.models.calling import in_backward
from pruningawaretraining.patterns.elements import input_dims
from pruningawaretraining.registry import calling, check_returned

logger = logging.getLogger(__name__)


def between_events(model: nn.Module, one: WeightRule) -> Callable[[], Tensor] | None:
    """A function that chooses a rule's masks between events by the present weights, keeping as many groups of each set.

    None for criteria that need more than the weights: their masks change at events only.
    """
    plain: Callable[[Any], Any] | None = getattr(one.criterion, "plain", None)
    if plain is None:
        return None
    window = getattr(one.pattern, "window", None)

    @torch.no_grad()
    def choose() -> Tensor:
        masks = one.masks
        with calling("criterion", one.criterion, EXPECTED_SCORES.format(one.grouping.size)):
            found = plain(one.grouping)
        scores_G = checked_scores(one.criterion, found, one.grouping.size, nan=False).to(masks.keep_G.device)
        if window is None:
            return top_of_sets(scores_G, one.grouping, masks.kept_by_set)
        whole = window[0] / window[1]
        if one.rule.target.sparsity is None or one.sparsity < min(one.rule.target.sparsity, whole) - 1e-3:
            return masks.keep_G  # only some of the windows are pruned so far: events choose which
        return allocate_windows(scores_G, one.grouping, window, whole, input_dims(model, one.grouping))

    return choose


def observe(rules: Iterable[ActiveRule], scale: Tensor | float) -> None:
    """Gradients are complete: criteria look at them, and events that wait for those of masked weights.

    Args:
        rules: all rules.
        scale: what the gradients are still multiplied with.
    """
    part = in_backward()
    for one in rules:
        if part:
            _warn_of_part(one)
        one.feed.observe(scale)
        one.observe_masked()


def _warn_of_part(one: ActiveRule) -> None:
    """Warn once of a rule that reads gradients where optimizers step in the backward pass."""
    if one.feed.told_of_part or not (one.listens or one.feed.reads_gradients):
        return
    one.feed.told_of_part = True
    logger.warning(
        "%s.%s: %r reads the gradients of whole steps, and optimizers that step in the backward pass leave only those "
        "of the first parameter. Allowed: one that reads none, or an optimizer that steps after the backward pass",
        *((one.key, "dynamic", one.rule.dynamic) if one.listens else (one.key, "criterion", one.rule.criterion)),
    )


def chosen(model: nn.Module, one: WeightRule, event: Event, pick: Callable[[], Tensor]) -> Tensor:
    """The masks that a rule's dynamic takes at an event; ``pick`` gives those of its allocation."""
    picked = cache(pick)
    with calling("dynamic", one.dynamic, EXPECTED_MASKS.format(event.grouping.size)):
        keep_G = one.dynamic.choose(event, lambda: picked().clone())
    found_G = checked_masks("dynamic", one.dynamic, keep_G, event.grouping.size).to(event.keep_G.device)
    own = type(one.dynamic).choose is not Dynamic.choose
    chooses = own or hasattr(one.criterion, "refine")  # others take the allocation's masks, which are nested
    back = int((found_G & ~event.keep_G).count_nonzero()) if one.dynamic.nested and chooses else 0
    expected = "masks that keep nothing that was masked before, or a dynamic that says nested = False"
    check_returned(not back, "dynamic", one.dynamic, found_G, expected, f"{back} groups that were masked before")
    if own:
        _check_alive(one, event, found_G, picked)
    if event.last and own:
        _check_last(model, one, event, found_G, picked())
    return found_G


def _check_alive(one: WeightRule, event: Event, found_G: Tensor, picked: Callable[[], Tensor]) -> None:
    """Refuse masks of a dynamic that leave nothing of a layer of which the allocation leaves something."""
    sizes = [each.size for each in event.grouping.sets]
    kept = counts_of(found_G, sizes)
    empty = [number for number, count in enumerate(kept) if not count]
    left = counts_of(picked(), sizes) if empty else []
    wrong = [event.grouping.sets[number].name for number in empty if left[number]]
    shown = f"masks that keep nothing of {wrong[0]!r}" if wrong else ""
    check_returned(not wrong, "dynamic", one.dynamic, found_G, "at least one group of every layer", shown)


def _check_last(model: nn.Module, one: WeightRule, event: Event, found_G: Tensor, picked_G: Tensor) -> None:
    """Refuse final masks of a dynamic that miss the target, or an N:M pattern, which the allocation's masks meet."""
    most = int(picked_G.sum()) + len(event.grouping.sets)  # layers may round their own way
    kept = int(found_G.sum())
    least = int(picked_G.sum()) - len(event.grouping.sets)
    shown = f"{kept} groups that are kept"
    expected = f"at most {most} at the last event, so that the target is met"
    check_returned(kept <= most, "dynamic", one.dynamic, found_G, expected, shown)
    expected = f"at least {least} at the last event: the target asks for no more"
    check_returned(kept >= least, "dynamic", one.dynamic, found_G, expected, shown)
    window = getattr(one.pattern, "window", None)
    if window is None:
        return
    dims = input_dims(model, event.grouping)
    pruned, windows = (count_pruned(keep_G, event.grouping, window, dims) for keep_G in (found_G, picked_G))
    shown = f"masks with {window[0]} zeros or more in {pruned} of the windows of {window[1]} weights"
    expected = f"{window[0]} zeros or more in at least {windows} of them at the last event"
    check_returned(pruned >= windows, "dynamic", one.dynamic, found_G, expected, shown)


def go_back(one: ActiveRule, masks: Masks, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Before the masks of an event: back to earlier weights, where the rule's dynamic does that."""
    with calling("dynamic", one.dynamic, "true or false"):
        goes_back = one.dynamic.goes_back(one.state.last is None or one.is_last(one.state.last))
    if not goes_back:
        return
    known = masks.snapshot is not None and (masks.snapshot.restore(optimizers) or masks.steps <= masks.snapshot.at)
    if not known:
        logger.warning("%s.dynamic: no weights to go back to: step %d has not been seen", one.key, one.dynamic.to)


def heard(one: WeightRule, now: int) -> bool:
    """Whether an event has the gradients of masked weights that its dynamic looks at."""
    with calling("dynamic", one.dynamic, "true or false"):
        return one.gradient_G is not None or not one.dynamic.hears(one.state.event, one.is_last(now))


def check_final(one: ActiveRule) -> None:
    """Refuse masks that are not final, and looks at masks, where to choose masks is to move the weights that stay.

    Raises:
        ConfigError: it names the dynamic or "stable", and the criterion.
    """
    moves = f"and {one.rule.criterion!r} with data of its own moves the other weights to make up for them"
    if not one.dynamic.nested:
        raise ConfigError(
            f"{one.key}.dynamic: {one.rule.dynamic!r} lifts masks again, {moves}. Allowed: frozen, rewind"
        )
    if one.rule.stable is not None:
        raise ConfigError(
            f"{one.key}.stable: {one.rule.stable} compares masks before they are put, {moves}. Allowed: another "
            "criterion, or a 'start' in numbers"
        )


# --- state ----------------------------------------------------------------------------------------------------------


def state_of_dynamic(masks: Masks) -> dict[str, Any]:
    """The state of a dynamic beside the masks: tensors and plain data."""
    return {
        "steps": masks.steps,
        "next": None if masks.next_G is None else masks.next_G.cpu().clone(),
        "aside": None if masks.store is None else masks.store.packed(masks.names),
        "snapshot": None if masks.snapshot is None else masks.snapshot.state_dict(),
    }


def load_dynamic(masks: Masks, state: Mapping[str, Any] | None, waits: bool = False) -> None:
    """Take what :func:`state_of_dynamic` gave; the masks are those of the state already.

    Args:
        masks: the masks.
        state: None in states of earlier versions, which knew frozen weights only.
        waits: whether an event waits for gradients of masked weights.

    Raises:
        CheckpointError: it is of other masks.
    """
    masks.passing = masks.dynamic.lives or (masks.dynamic.listens and waits)
    if state is None:
        return
    if masks.store is not None and state["aside"] is None:  # of a run that has ended, or had frozen weights
        masks.settle_for_good()
    masks.steps = int(state["steps"])
    masks.next_G = None if state["next"] is None else state["next"].to(masks.keep_G.device)
    if masks.store is not None:
        masks.store.load(state["aside"], masks.names)
    if masks.snapshot is not None and state["snapshot"] is not None:
        masks.snapshot.load_state_dict(state["snapshot"])
