"""The engine's part of a run's state: masks, removed groups, statistics, and where each rule stands.

Shape suffixes: ``_D`` groups of the dense model, ``_G`` groups that are still there or of one rule.

A state is read and checked as a whole before anything changes; every change can then be undone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruningawaretraining.engine.context import RemovalContext
from pruningawaretraining.engine.coupled import CoupledGroups
from pruningawaretraining.engine.dynamics import load_dynamic, state_of_dynamic
from pruningawaretraining.engine.engine import Engine
from pruningawaretraining.engine.memory import memory
from pruningawaretraining.engine.rule import PHASES, RuleState
from pruningawaretraining.engine.weight_rules import WeightRule
from pruningawaretraining.engine.weights import WeightGroups
from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.masks.removal import remove
from pruningawaretraining.models.compiling import forget_compiled
from pruningawaretraining.models.surgery import Surgery
from pruningawaretraining.models.widths import conv_linear_widths


def state_of(engine: Engine) -> dict[str, Any]:
    """The state of the rules of both kinds: tensors and plain data."""
    return {
        "channels": None if engine.coupled is None else _state_of_coupled(engine.coupled),
        "elements": None
        if engine.weights is None
        else {"rules": [_state_of_rule(one) for one in engine.weights.rules]},
    }


def _state_of_coupled(coupled: CoupledGroups) -> dict[str, Any]:
    return {
        "sets": _set_sizes(coupled),
        "keep": coupled.keep_D.clone(),
        "removed": _removed_D(coupled),
        "widths": {name: list(widths) for name, widths in conv_linear_widths(coupled.model).items()},
        "rules": [vars(one.state).copy() for one in coupled.rules],
        "heard": [one.feed.state_dict() for one in coupled.rules],
        "reset_optimizer": coupled.reset_optimizer,
        "dynamic": state_of_dynamic(coupled.masks),
    }


def _set_sizes(coupled: CoupledGroups) -> dict[str, int]:
    return {one.name: one.size for one in coupled.dense_sets}


def _removed_D(coupled: CoupledGroups) -> Tensor:
    removed_D = torch.ones(len(coupled.keep_D), dtype=torch.bool)
    removed_D[coupled.live_D] = False
    return removed_D


def _state_of_rule(one: WeightRule) -> dict[str, Any]:
    return {
        "key": one.key,
        "sets": _sizes_of(one),
        "state": vars(one.state).copy(),
        "keep": one.masks.keep_G.cpu().clone(),
        "next": None if one.next_G is None else one.next_G.cpu().clone(),
        "scores": None if one.scores_G is None else one.scores_G.cpu().clone(),
        "collector": one.feed.state_dict(),
        "dynamic": state_of_dynamic(one.masks),
    }


def _sizes_of(one: WeightRule) -> dict[str, int]:
    return {group_set.name: group_set.size for group_set in one.grouping.sets}


# --- reading --------------------------------------------------------------------------------------------------------


def _read_rule_state(values: Mapping[str, Any]) -> RuleState:
    state = RuleState(**values)
    if state.phase not in PHASES:
        raise CheckpointError(f"state: phase {state.phase!r} is not one of {', '.join(PHASES)}")
    for name in ("event", "part", "last", "waiting", "begun", "opened", "member"):
        value = getattr(state, name)
        if not (name in ("last", "waiting", "begun", "opened") and value is None) and not is_whole(value):
            raise CheckpointError(f"state: {name}: {value!r} is not a whole number of 0 or more")
    if not isinstance(state.holds, bool) or (state.holds and not state.member):
        raise CheckpointError(f"state: holds: {state.holds!r} is not true or false, or there is no member yet")
    if not _is_finite(state.initial) or not 0 <= state.initial <= 1:
        raise CheckpointError(f"state: initial: {state.initial!r} is not a fraction")
    numbers = state.scale is None or (isinstance(state.scale, list) and all(map(_is_finite, state.scale)))
    if not numbers or not isinstance(state.latencies, list) or not all(isinstance(x, dict) for x in state.latencies):
        raise CheckpointError("state: scale or latencies are not lists of numbers or of measurements")
    return state


def _check_would(key: str, state: RuleState, size: int) -> None:
    """Refuse masks of a look that are of other groups."""
    would = state.would
    if would is not None and not (isinstance(would, Tensor) and would.shape == (size,) and would.dtype is torch.bool):
        raise CheckpointError(f"state: the masks that {key} would choose are not those of its {size} groups")


def is_whole(value: Any) -> bool:
    """Whether a value of a state is a count."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


@dataclass(frozen=True)
class _Coupled:
    """A state of the coupled groups that fits a model."""

    keep_D: Tensor
    removed_D: Tensor
    rules: list[RuleState]
    statistics: list[Any]
    widths: Mapping[str, Any]
    reset_optimizer: bool
    dynamic: Mapping[str, Any] | None


def _read_coupled(coupled: CoupledGroups, state: Mapping[str, Any]) -> _Coupled:
    sets = _set_sizes(coupled)
    if state["sets"] != sets:
        other = sorted(set(sets.items()) ^ set(state["sets"].items()))[0]
        raise CheckpointError(
            f"state: it was saved for other channel groups: {other[0]!r} of {other[1]} differs. "
            "Build the model as it was before pruning"
        )
    keep_D, removed_D = state["keep"].cpu().bool().clone(), state["removed"].cpu().bool()
    if keep_D.shape != coupled.keep_D.shape or removed_D.shape != keep_D.shape or bool((keep_D & removed_D).any()):
        raise CheckpointError("state: its masks contradict each other, or its groups; it is damaged")
    if bool((_removed_D(coupled) & ~removed_D).any()):
        raise CheckpointError(
            "state: this model has lost channels that the state still has; load into a freshly built dense model"
        )
    rules = [_read_rule_state(values) for _, values in zip(coupled.rules, state["rules"], strict=True)]
    statistics = state.get("heard", [None] * len(coupled.rules))  # absent from states of early versions
    for one, rule_state, known in zip(coupled.rules, rules, statistics, strict=True):
        if rule_state.member > len(one.members):
            raise CheckpointError(f"state: {one.key} has met {rule_state.member} of {len(one.members)} targets")
        first = rule_state.first
        if first is not None and (not isinstance(first, Tensor) or first.shape != one.groups_D.shape):
            raise CheckpointError(f"state: the first scores of {one.key} are not those of its groups")
        _check_would(one.key, rule_state, one.groups_D.numel())
        if known is not None and not isinstance(known, Mapping):
            raise CheckpointError(f"state: the statistics of {one.key} are damaged")
    if not isinstance(state["reset_optimizer"], bool) or not isinstance(state["widths"], Mapping):
        raise CheckpointError("state: reset_optimizer or widths are not what they should be; it is damaged")
    return _Coupled(
        keep_D, removed_D, rules, statistics, state["widths"], state["reset_optimizer"], state.get("dynamic")
    )


def _check_keys(weights: WeightGroups, state: Mapping[str, Any]) -> list[RuleState]:
    keys = [one["key"] for one in state["rules"]]
    if keys != [one.key for one in weights.rules]:
        raise CheckpointError(f"state: it is of the rules {keys}, not of {[one.key for one in weights.rules]}")
    read = [_read_rule_state(values["state"]) for values in state["rules"]]
    for one, rule_state, values in zip(weights.rules, read, state["rules"], strict=True):
        if rule_state.first is not None:
            raise CheckpointError(f"state: {one.key} has first scores, which only rules of channels have")
        known = values["collector"]
        if (known is None) != (one.feed.state_dict() is None) or not isinstance(known, (Mapping, type(None))):
            raise CheckpointError(f"state: the statistics of {one.key} are damaged, or of another criterion")
    return read


def _check_masks(one: WeightRule, rule_state: RuleState, values: Mapping[str, Any]) -> None:
    """Refuse masks of other groups; compared once the channels are those of the state."""
    sets = _sizes_of(one)
    if values["sets"] != sets:
        other = sorted(set(sets.items()) ^ set(values["sets"].items()))[0]
        raise CheckpointError(f"state: {one.key} was saved for other groups: {other[0]!r} of {other[1]} differs")
    _check_would(one.key, rule_state, one.grouping.size)
    for name in ("keep", "next", "scores"):
        value = values[name]
        if not (value is None and name != "keep") and value.shape != (one.grouping.size,):
            raise CheckpointError(f"state: {one.key}: {name} has another length than its {one.grouping.size} groups")


# --- loading --------------------------------------------------------------------------------------------------------


def load_into(
    engine: Engine, state: Mapping[str, Any], context: RemovalContext, undo: list[Callable[[], None]]
) -> bool:
    """Bring an engine to a state, and its model to the architecture of it; weights are loaded after that.

    Args:
        engine: of a model that has lost no more groups than the state's.
        state: as :func:`state_of` gives it.
        context: optimizers, averages and graphs that follow.
        undo: gets functions that put everything back, to be called in reverse order if something fails.

    Returns:
        Whether groups were removed.

    Raises:
        CheckpointError: the state is of another model, or of a time before this one lost groups.
        KeyError, TypeError, ValueError, RuntimeError: it is damaged; ``undo`` puts back what has changed.
    """
    coupled, weights = engine.coupled, engine.weights
    read = None if coupled is None or state["channels"] is None else _read_coupled(coupled, state["channels"])
    finer = None if weights is None or state["elements"] is None else state["elements"]
    rules = [] if weights is None or finer is None else _check_keys(weights, finer)
    surgeries: list[Surgery] = []
    undo.append(memory(engine, surgeries))
    engine.release()
    removed = coupled is not None and read is not None and _remove_more(engine, coupled, read, context, surgeries)
    if weights is not None and finer is not None:
        for one, rule_state, values in zip(weights.rules, rules, finer["rules"], strict=True):
            _check_masks(one, rule_state, values)
    if coupled is not None and read is not None:
        _load_coupled(coupled, read)
    if weights is not None and finer is not None:
        for one, rule_state, values in zip(weights.rules, rules, finer["rules"], strict=True):
            _load_rule(one, rule_state, values)
    engine.follow_phases()
    return removed


def _remove_more(
    engine: Engine, coupled: CoupledGroups, read: _Coupled, context: RemovalContext, surgeries: list[Surgery]
) -> bool:
    """Remove what a state's model has lost and this one not yet."""
    keep_G = ~read.removed_D[coupled.live_D]
    removed = not bool(keep_G.all())
    if removed:
        coupled.masks.clear()
        found = coupled.found
        surgeries.append(remove(coupled.model, found, keep_G, context.optimizers, context.followers, context.graphs))
        forget_compiled(coupled.model)
        coupled.follow_removal(keep_G)
        engine.penalties.forget()
        if engine.weights is not None:
            engine.weights.relabel()
    for name, (outputs, inputs) in conv_linear_widths(coupled.model).items():
        if read.widths[name] != [outputs, inputs]:
            raise CheckpointError(
                f"state: {name!r} has {read.widths[name]} outputs and inputs in it, and [{outputs}, {inputs}] here"
            )
    return removed


def _load_coupled(coupled: CoupledGroups, read: _Coupled) -> None:
    for one, known in zip(coupled.rules, read.statistics, strict=True):
        one.feed.load_state_dict(known)
    coupled.keep_D = read.keep_D
    coupled.masks.set(read.keep_D[coupled.live_D])
    load_dynamic(coupled.masks, read.dynamic)
    for one, rule_state in zip(coupled.rules, read.rules, strict=True):
        one.state = rule_state
    coupled.reset_optimizer = read.reset_optimizer


def _load_rule(one: WeightRule, rule_state: RuleState, values: Mapping[str, Any]) -> None:
    device = one.masks.keep_G.device
    one.feed.load_state_dict(values["collector"])
    one.masks.set(values["keep"])
    load_dynamic(one.masks, values.get("dynamic"), rule_state.waiting is not None)
    to_lift = one.rule.mode == "unprune" and one.masks.active  # masks of another rule, which this one lifts at start
    one.state = RuleState() if to_lift else rule_state
    one.next_G = None if values["next"] is None else values["next"].to(device)
    one.scores_G = None if values["scores"] is None else values["scores"].to(device)
