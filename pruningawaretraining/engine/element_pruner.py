"""Slices, blocks, N:M and single weights through a whole training: score, allocate and mask on a schedule.

Shape suffixes: ``_G`` groups of one rule.

An event of a rule takes place in an epoch's ``prune`` or at the start of a step, once each. Where its criterion needs
gradients or activations and none has been seen, it waits for the first ones, which come before the weights move.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.allocation.threshold import progressive, zero_groups
from pruningawaretraining.config.schema import Rule
from pruningawaretraining.criteria.second_order import Calibration, Sampling
from pruningawaretraining.distributed.collectives import agreed
from pruningawaretraining.engine.compensation import WeightPruner, put, weight_pattern
from pruningawaretraining.engine.element_rules import (
    ElementPattern,
    ElementRule,
    ElementState,
    decide,
    has_seen,
    make_rule,
    scores_of,
)
from pruningawaretraining.engine.phases import tell_of_whole_epochs
from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.groups.views import slot_maxima, slot_sums
from pruningawaretraining.masks.element_penalties import BlockLasso, SlicePenalty
from pruningawaretraining.registry import build
from pruningawaretraining.schedules import Asked

PHASES = ("regularize", "prune", "finetune", "done")

log = logging.getLogger(__name__)

DONE = {"prune": "pruned", "unprune": "masks lifted", "lock": "zeros locked"}
Optimizers = Sequence[torch.optim.Optimizer]


class ElementPruner:
    """Drives the rules of one model that prune finer than channels.

    Args:
        model: the model.
        rules: (key, rule, built pattern, whether a channel rule works on the same layers), enabled ones.
    """

    def __init__(self, model: nn.Module, rules: Iterable[tuple[str, Rule, ElementPattern, bool]]) -> None:
        self.model = model
        self.rules = [make_rule(model, *one) for one in rules]
        self.calibration: Calibration | None = None  # data that criteria look at instead of training
        self._empty: set[tuple[str, str]] = set()  # (rule, layer) without any weight, as has been said
        self._gathered = False

    @property
    def phase(self) -> str:
        """The earliest phase of any rule."""
        return min((one.state.phase for one in self.rules), key=PHASES.index, default="done")

    @property
    def groups(self) -> tuple[int, int]:
        """(groups, those that are masked) of all rules."""
        return (
            sum(one.grouping.size for one in self.rules),
            sum(one.grouping.size - sum(one.masks.kept_by_set) for one in self.rules),
        )

    @property
    def sparsity(self) -> float:
        """Fraction of all groups that are masked."""
        groups, gone = self.groups
        return gone / groups if groups else 0.0

    @property
    def finished(self) -> list[str]:
        """Keys of the rules that have reached what they were to reach."""
        return [one.key for one in self.rules if one.state.phase == "finetune"]

    def norms(self) -> dict[str, Tensor]:
        """L2 norms of all groups by the name of their weight, on the CPU."""
        return {
            member.name: slot_sums(member, member.parameter.detach().float().square()).sqrt().cpu()
            for one in self.rules
            for member in one.grouping.members
        }

    def describe_groups(self) -> list[dict[str, Any]]:
        """One dict for each layer of each rule: source, dependencies (none), size and kept groups."""
        rows = []
        for one in self.rules:
            for member, kept in zip(one.grouping.members, one.masks.kept_of_members(), strict=True):
                rows.append({"source": member.name, "dependencies": [], "size": member.n_slots, "kept": kept})
        return rows

    def calibrate(self, calibration: Calibration) -> None:
        """Let second-order rules measure curvature on this data.

        Raises:
            ConfigError: such a rule has a pattern that they cannot prune.
        """
        for one in self.rules:
            if isinstance(one.criterion, Sampling):
                weight_pattern(one.pattern, f"{one.key}.pattern")
        self.calibration = calibration
        for one in self.rules:
            if one.state.waiting is not None:  # it was due when the pruner was made, or before anything was heard
                self._fire(one, one.state.waiting, ())

    # --- events -------------------------------------------------------------------------------------------------

    def at_init(self, optimizers: Optimizers) -> None:
        """Let rules that begin with the pruner have their one event."""
        for one in self.rules:
            if one.rule.at_init and one.rule.start <= 0 and one.state.last is None:
                self._fire(one, one.times.first, optimizers)

    def tick(self, unit: str, now: int, optimizers: Optimizers) -> list[str]:
        """Let every rule that counts in ``unit`` ("epoch" or "step") have the event or part that is due.

        Returns:
            One line for each event.
        """
        lines: list[str] = []
        for one in self.rules:
            if one.times.counts == unit:
                self._advance(one, now, optimizers)
                lines += self._fire(one, now, optimizers) if one.due(now) else []
        return lines

    def on_round(self, scale: Tensor | float, optimizers: Optimizers) -> list[str]:
        """Gradients are complete and no weight has moved: gather what criteria need; events that waited take place.

        Args:
            scale: what the gradients are still multiplied with.
            optimizers: those of the model.
        """
        lines: list[str] = []
        for one in self.rules:
            if one.collector is not None and one.gathers and not self._gathered and not self._by_curvature(one):
                one.collector.on_before_step(one.grouping, scale)
            if one.state.waiting is not None:
                lines += self._fire(one, one.state.waiting, optimizers)
        self._gathered = True
        return lines

    def on_moved(self, fresh: Tensor | int, rates: Callable[[], Mapping[int, Tensor | float]]) -> None:
        """Weights have moved: shrink blocks, and zero what is masked.

        Args:
            fresh: 1 if that makes a real step, else 0.
            rates: gives learning rates by the ids of parameters.
        """
        self._gathered = False
        self._shrink(fresh, rates)
        for one in self.rules:
            one.masks.apply()

    def on_stepped(self, count: int, optimizers: Optimizers) -> list[str]:
        """Have the last event of a schedule at once.

        Args:
            count: real steps so far.
            optimizers: those of the model.
        """
        lines: list[str] = []
        for one in self.rules:
            if one.times.counts == "step" and count == one.times.last and one.due(count):
                self._advance(one, count, optimizers)
                lines += self._fire(one, count, optimizers)
        return lines

    def release(self) -> None:
        """Take every hook out of the model; the weights stay as they are."""
        for one in self.rules:
            one.masks.clear()
            if one.collector is not None:
                one.collector.detach()

    def finish(self, optimizers: Optimizers) -> None:
        """Training ends: events in parts are completed, and nothing listens any more."""
        for one in self.rules:
            if one.next_G is not None:
                self._mask(one, one.next_G, optimizers)
            if one.collector is not None:
                one.collector.detach()

    def _fire(self, one: ElementRule, now: int, optimizers: Optimizers) -> list[str]:
        if one.gathers and not has_seen(one) and self.calibration is None:
            one.state.waiting = now
            return []
        one.state.waiting = None
        if one.state.event == 0:
            tell_of_whole_epochs(one.key, one.times)
        if one.state.event == 0 and (one.rule.keep_zeros or one.rule.mode == "lock"):
            self._mask(one, one.masks.keep_G & ~zero_groups(one.grouping).to(one.masks.keep_G.device), optimizers)
            one.state.initial = one.sparsity
        one.state.event += 1
        one.state.last = now
        if one.rule.mode == "prune":
            last = now >= one.times.last
            self._prune(one, now, optimizers)
        else:
            if one.rule.mode == "unprune":
                one.masks.clear()
            last = True
        one.state.phase = "finetune" if last else "prune"
        self._warn_of_empty_layers(one)
        line = f"{one.key}: {one.times.counts} {now}: {DONE[one.rule.mode]}, sparsity {one.sparsity:.4f}"
        if last and one.rule.release:
            if one.next_G is not None:
                self._mask(one, one.next_G, optimizers)
            one.masks.clear()
            line += "; masks lifted"
        return [line]

    def _warn_of_empty_layers(self, one: ElementRule) -> None:
        """Say once which layers have no weight left: the model may be cut in two there."""
        for each, kept in zip(one.grouping.sets, one.masks.kept_by_set, strict=True):
            if kept:
                continue
            name = each.name
            if (one.key, name) not in self._empty:
                self._empty.add((one.key, name))
                log.warning(
                    "%s: no weight is left in %s; max_sparsity below 1 keeps some in every layer", one.key, name
                )

    def _by_curvature(self, one: ElementRule) -> bool:
        """Whether the rule's events measure curvature and compensate what stays."""
        return self.calibration is not None and isinstance(one.criterion, Sampling)

    def _prune(self, one: ElementRule, now: int, optimizers: Optimizers) -> None:
        for asked in one.times.asked(now, one.state.initial):
            if asked.sparsity > 0 or one.rule.min_sparsity > 0:
                self._prune_layers(one, now, asked, optimizers)

    def _prune_layers(self, one: ElementRule, now: int, asked: Asked, optimizers: Optimizers) -> None:
        if self.calibration is not None and self._by_curvature(one):
            self._mask(one, prune_by_curvature(self.calibration, one, asked), optimizers)
            return
        scores_G = scores_of(one, self.calibration)
        (next_G,) = agreed(decide(self.model, one, scores_G, asked))
        if min(one.rule.progressive, one.rule.every) > 1:
            one.next_G, one.scores_G, one.state.begun, one.state.part = next_G, scores_G, now, 0
            self._advance(one, now, optimizers)
        else:
            self._mask(one, next_G, optimizers)

    def _advance(self, one: ElementRule, now: int, optimizers: Optimizers) -> None:
        """Of an event in parts, mask the parts that are due by now."""
        if one.next_G is None or one.scores_G is None or one.state.begun is None:
            return
        parts = int(min(one.rule.progressive, one.rule.every))
        part = int((now - one.state.begun) * parts // one.rule.every) + 1
        if part >= parts:
            self._mask(one, one.next_G, optimizers)
            return
        if part > one.state.part:
            left, going = parts - one.state.part, part - one.state.part
            keep_G = one.masks.keep_G
            keep_G = progressive(keep_G, one.next_G.to(keep_G.device), one.scores_G.to(keep_G.device), going, left)
            one.state.part = part
            self._set(one, keep_G, optimizers)

    def _mask(self, one: ElementRule, keep_G: Tensor, optimizers: Optimizers) -> None:
        one.next_G = one.scores_G = one.state.begun = None
        one.state.part = 0
        self._set(one, keep_G, optimizers)

    def _set(self, one: ElementRule, keep_G: Tensor, optimizers: Optimizers) -> None:
        one.masks.set(keep_G)
        one.masks.apply_to_gradients()
        one.masks.apply_to_state(optimizers)

    # --- regularising -------------------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """The differentiable penalty of all rules that have one and are not done."""
        total = torch.zeros((), device=next((p.device for p in self.model.parameters()), torch.device("cpu")))
        for one, options in self._regularizers():
            if isinstance(options, SlicePenalty):
                total = total + options.penalty(one.grouping).to(total.device)
        return total

    def _shrink(self, fresh: Tensor | int, rates: Callable[[], Mapping[int, Tensor | float]]) -> None:
        shrinking = [(one, options) for one, options in self._regularizers() if isinstance(options, BlockLasso)]
        if not shrinking or not (isinstance(fresh, Tensor) or fresh):
            return
        rate = rates()
        for one, options in shrinking:
            options.after_step(one.grouping, lambda parameter: rate.get(id(parameter), 0.0) * fresh)

    def _regularizers(self) -> list[tuple[ElementRule, Any]]:
        regularized = [one for one in self.rules if one.rule.regularizer is not None and one.works]
        return [(one, build("regularizer", one.rule.regularizer, f"{one.key}.regularizer")) for one in regularized]

    # --- changes of the model, and state ------------------------------------------------------------------------

    def rebind(self) -> None:
        """Take the model's parameters as they are now, by their names: ``fully_shard`` has exchanged them.

        Raises:
            ConfigError: a rule by second order with data of its own.
        """
        for one in self.rules:
            if self._by_curvature(one):
                raise ConfigError(
                    f"{one.key}.criterion: {one.rule.criterion!r} compensates whole layers, and fully_shard has spread "
                    "them. Allowed: DistributedDataParallel, or pruning before fully_shard"
                )
            members = tuple(replace(m, parameter=self.model.get_parameter(m.name)) for m in one.grouping.members)
            one.grouping = replace(one.grouping, members=members, _cache={})
            one.masks = one.masks.on(one.grouping)

    def rebuild(self, optimizers: Optimizers) -> None:
        """Label the weights anew after channels have been removed; rules that had begun keep their sparsity."""
        for number, old in enumerate(self.rules):
            new = make_rule(self.model, old.key, old.rule, old.pattern, old.stacked)
            if _same_tensors(old, new):  # nothing of it has gone: what it has gathered stays
                if new.collector is not None:
                    new.collector.detach()
                continue
            old.masks.clear()
            if old.collector is not None:
                old.collector.detach()
            self.rules[number] = new
            new.state, new.times = old.state, old.times
            new.state.begun, new.state.part = None, 0
            if not old.state.event or (old.rule.release and old.state.phase == "finetune"):
                continue
            if old.rule.mode == "prune" and old.state.last is not None:
                for now in [*old.times.ends_before(old.state.last), old.state.last]:
                    for asked in old.times.asked(now, old.state.initial):
                        self._set(new, decide(self.model, new, scores_of(new), asked), optimizers)
            elif old.rule.mode == "lock":
                self._set(new, ~zero_groups(new.grouping), optimizers)

    def adopt(self, keys: Iterable[str]) -> None:
        """Rules that a loaded file has seen through: the zeros of its weights are their masks."""
        for one in self.rules:
            if one.key in set(keys):
                one.masks.set(~zero_groups(one.grouping))
                one.state.phase, one.state.event = "finetune", 1

    def state_dict(self) -> dict[str, Any]:
        """Masks, scores, and where each rule stands: tensors and plain data."""
        return {"rules": [_state_of(one) for one in self.rules]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; load the model's weights as well.

        Raises:
            CheckpointError: it is of other rules or another model.
        """
        keys = [one["key"] for one in state["rules"]]
        if keys != [one.key for one in self.rules]:
            raise CheckpointError(f"state: it is of the rules {keys}, not of {[one.key for one in self.rules]}")
        for one, values in zip(self.rules, state["rules"], strict=True):
            _load(one, values)


def _same_tensors(old: ElementRule, new: ElementRule) -> bool:
    before, after = old.grouping.members, new.grouping.members
    return len(before) == len(after) and all(a.parameter is b.parameter for a, b in zip(before, after, strict=True))


def _state_of(one: ElementRule) -> dict[str, Any]:
    return {
        "key": one.key,
        "sets": {group_set.name: group_set.size for group_set in one.grouping.sets},
        "state": vars(one.state).copy(),
        "keep": one.masks.keep_G.cpu().clone(),
        "next": None if one.next_G is None else one.next_G.cpu().clone(),
        "scores": None if one.scores_G is None else one.scores_G.cpu().clone(),
        "collector": None if one.collector is None else one.collector.state_dict(),
    }


def _load(one: ElementRule, values: Mapping[str, Any]) -> None:
    sets = {group_set.name: group_set.size for group_set in one.grouping.sets}
    if values["sets"] != sets:
        other = sorted(set(sets.items()) ^ set(values["sets"].items()))[0]
        raise CheckpointError(f"state: {one.key} was saved for other groups: {other[0]!r} of {other[1]} differs")
    device = one.masks.keep_G.device
    one.state = ElementState(**values["state"])
    one.masks.set(values["keep"])
    one.next_G = None if values["next"] is None else values["next"].to(device)
    one.scores_G = None if values["scores"] is None else values["scores"].to(device)
    if one.collector is not None and values["collector"] is not None:
        one.collector.load_state_dict(values["collector"])


def prune_by_curvature(calibration: Calibration, one: ElementRule, asked: Asked) -> Tensor:
    """One event of a second-order rule: measure, decide, and move the weights that stay to where the loss rises least.

    Args:
        calibration: model, data and loss.
        one: the rule; the weights change in place.
        asked: what the event asks for.

    Returns:
        Its new masks, those of single weights also where groups are larger.
    """
    rule = one.rule if asked.layers is None else one.rule.model_copy(update={"layers": list(asked.layers)})
    pruner = WeightPruner(calibration, rule, weight_pattern(one.pattern, f"{one.key}.pattern"), one.criterion)
    masks = {member.name: keep_W for member, keep_W in one.grouping.expand(one.masks.keep_G)}
    so_far = {
        group_set.name: masks[member.name].expand(member.parameter.shape).contiguous()
        for group_set, member in zip(one.grouping.sets, one.grouping.members, strict=True)
    }
    pruned = pruner.event(asked.sparsity, so_far)
    put(calibration.model, pruned)
    device = one.masks.keep_G.device
    kept = [
        slot_maxima(member, pruned[group_set.name].keep_W.float()).to(device)
        if group_set.name in pruned
        else slot_maxima(member, so_far[group_set.name].float()).to(device)
        for group_set, member in zip(one.grouping.sets, one.grouping.members, strict=True)
    ]
    return torch.cat(kept) > 0
