"""Snapshots of an engine, to restore it if a change fails or is interrupted in the middle.

Shape suffixes: ``_G`` groups that are still there or of one rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import nn

from pruningawaretraining.engine.coupled import CoupledGroups
from pruningawaretraining.engine.dynamics import load_dynamic, state_of_dynamic
from pruningawaretraining.engine.penalties import ActivePenalties
from pruningawaretraining.engine.rule import ActiveRule
from pruningawaretraining.engine.weights import WeightGroups
from pruningawaretraining.masks.masks import Masks
from pruningawaretraining.models.surgery import Surgery


class Remembered(Protocol):
    """An engine, as far as its memory has to know it."""

    model: nn.Module
    coupled: CoupledGroups | None
    weights: WeightGroups | None
    penalties: ActivePenalties

    @property
    def rules(self) -> Sequence[ActiveRule]:
        """All rules."""

    @property
    def masks(self) -> Sequence[Masks]:
        """Every mask that acts in a step."""

    def release(self) -> None:
        """Take the hooks of every criterion out."""

    def follow_phases(self) -> None:
        """Let each criterion follow the training while its rule needs it."""


def memory(engine: Remembered, surgeries: list[Surgery]) -> Callable[[], None]:
    """Return a function that puts architecture, masks, rules and statistics back as they are now.

    Args:
        engine: what may change.
        surgeries: changes of the model and what follows it, made from here on; undone as well.
    """
    coupled, weights = engine.coupled, engine.weights
    names = ("found", "live_D", "keep_D", "reset_optimizer")
    values = {} if coupled is None else {name: getattr(coupled, name) for name in names}
    keep_G = None if coupled is None else coupled.masks.keep_G
    rules = [] if weights is None else list(weights.rules)
    known = [(one, replace(one.state), one.next_G, one.scores_G, one.feed.state_dict()) for one in engine.rules]
    kept = [(one.masks.keep_G, state_of_dynamic(one.masks)) for one in rules]
    living = None if coupled is None else state_of_dynamic(coupled.masks)
    modules = [(one, _tables(one)) for one in engine.model.modules()]

    def undo() -> None:
        engine.release()
        for masks in engine.masks:
            masks.clear()
        for surgery in reversed(surgeries):
            surgery.undo()
        _put_back(modules)
        engine.penalties.forget()
        if coupled is not None and keep_G is not None:
            for name, value in values.items():
                setattr(coupled, name, value)
            coupled.make_feeds()
            coupled.mask_again(keep_G)
            load_dynamic(coupled.masks, living)
        if weights is not None:
            weights.rules[:] = rules
            for one, (keep, dynamic) in zip(rules, kept, strict=True):
                one.masks.set(keep)
                load_dynamic(one.masks, dynamic, one.masks.passing)
        for rule, rule_state, next_G, scores_G, statistics in known:
            rule.state, rule.next_G, rule.scores_G = rule_state, next_G, scores_G
            rule.feed.load_state_dict(statistics)
        engine.follow_phases()

    return undo


Tables = dict[str, tuple[dict[Any, Any], dict[Any, Any]]]  # name -> the dictionary, and what is in it
TENSORS, HOOKS = ("_parameters", "_buffers"), ("_forward_hooks", "_forward_pre_hooks")


def _tables(module: nn.Module) -> Tables:
    return {name: (vars(module)[name], dict(vars(module)[name])) for name in (*TENSORS, *HOOKS)}


def _put_back(modules: Iterable[tuple[nn.Module, Tables]]) -> None:
    """Give modules the tensors that they had, and take out hooks that have come since: a run of the model that is cut
    short may leave some, since its own cleaning up may be what was interrupted."""
    for module, tables in modules:
        for name in TENSORS:
            table, known = tables[name]
            vars(module)[name] = table
            table.clear()
            table.update(known)
        for name in HOOKS:
            table, known = tables[name]
            for key in table.keys() - known.keys():
                del table[key]
