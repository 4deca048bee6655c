"""Rules that prune finer than channels: what they label, where they stand, and which masks they want next.

Shape suffixes: ``_G`` groups of one rule.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pruningawaretraining.allocation.threshold import ElementLimits, allocate, allocate_windows, classes_of
from pruningawaretraining.config.schema import Rule
from pruningawaretraining.config.targets import COSTS
from pruningawaretraining.criteria.base import Collector, Criterion, Statistics, collector_of, scorable
from pruningawaretraining.criteria.second_order import Calibration
from pruningawaretraining.criteria.second_order.gathering import gathered
from pruningawaretraining.engine.phases import outside_phase, tell_what_stays
from pruningawaretraining.errors import ConfigError, ModelError, TargetError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.masks.element_masks import ElementMasks
from pruningawaretraining.masks.element_penalties import BlockLasso, SlicePenalty
from pruningawaretraining.patterns.block import NofM
from pruningawaretraining.patterns.elements import input_dims
from pruningawaretraining.patterns.slice import Slice, pruned_channels
from pruningawaretraining.registry import build, lookup
from pruningawaretraining.schedules import Asked, Timeline

log = logging.getLogger(__name__)


@runtime_checkable
class ElementPattern(Protocol):
    """A pattern that labels the weights of layers."""

    def build(self, model: nn.Module, layers: Sequence[str] | None = None, exclude: Sequence[str] = ()) -> Grouping:
        """The groups of the selected layers."""
        ...


@dataclass
class ElementState:
    """Where one rule stands.

    Args:
        phase: "regularize", "prune" or "finetune".
        event: how many events there have been.
        last: the last epoch or step with an event.
        waiting: an event that waits for gradients.
        begun: when the event began whose masks are still taken in parts.
        part: parts of it that have been taken.
        initial: sparsity when the first event began.
    """

    phase: str = "regularize"
    event: int = 0
    last: int | None = None
    waiting: int | None = None
    begun: int | None = None
    part: int = 0
    initial: float = 0.0


@dataclass(eq=False)
class ElementRule:
    """A rule with its groups.

    Args:
        rule: the configuration.
        key: how messages call it.
        pattern: what labels the weights.
        stacked: whether a rule for channels works on the same layers.
        grouping, masks: its groups, and which of them are masked.
        criterion, collector: what scores them, and gathers what that needs.
        next_G, scores_G: the masks that an event in parts goes to, and the order of it.
    """

    rule: Rule
    key: str
    pattern: ElementPattern
    stacked: bool
    grouping: Grouping
    masks: ElementMasks
    criterion: Criterion
    collector: Collector | None
    state: ElementState = field(default_factory=ElementState)
    next_G: Tensor | None = None
    scores_G: Tensor | None = None
    times: Timeline = field(init=False)

    def __post_init__(self) -> None:
        self.times = self.rule.timeline()

    @property
    def window(self) -> tuple[int, int] | None:
        return self.pattern.window if isinstance(self.pattern, NofM) else None

    @property
    def works(self) -> bool:
        """Whether the rule has anything left to do."""
        return self.state.phase in ("regularize", "prune")

    @property
    def gathers(self) -> bool:
        """Whether an event will still need what its collector gathers."""
        return self.works and self.rule.mode == "prune" and self.rule.target.sparsity is not None

    def due(self, now: int) -> bool:
        """Whether an epoch or step has an event that has not been yet."""
        aimless = self.rule.mode == "prune" and self.rule.target.sparsity is None
        if not self.works or aimless or self.state.waiting is not None:
            return False
        return self.times.is_event(now) and (self.state.last is None or now > self.state.last)

    def asks(self, steps: range) -> bool:
        """Whether it matters for an event, or a part of one, which of these is the number of real steps."""
        if self.times.counts != "step":
            return False
        coming = steps[max(0, self.times.first - steps.start) :]
        return self.next_G is not None or any(self.due(now) for now in coming)

    def limits(self) -> ElementLimits:
        return ElementLimits(self.rule.min_sparsity, self.rule.max_sparsity)

    @property
    def sparsity(self) -> float:
        """Fraction of its groups that are masked."""
        return 1.0 - sum(self.masks.kept_by_set) / self.grouping.size if self.grouping.size else 0.0


def make_rule(model: nn.Module, key: str, rule: Rule, pattern: ElementPattern, stacked: bool = False) -> ElementRule:
    """Label a rule's weights and check what it asks for.

    Args:
        model: the model.
        key: how messages call the rule.
        rule: the configuration.
        pattern: its pattern, built.
        stacked: whether a rule for channels works on the same layers.

    Raises:
        ConfigError: a layer or option that cannot be used.
        TargetError: a sparsity that an N:M pattern cannot have.
    """
    _check_options(key, rule, pattern)
    grouping = _grouping(model, key, rule, pattern)
    criterion: Criterion = build("criterion", rule.criterion, f"{key}.criterion")
    if getattr(criterion, "for_channels", False):
        raise ConfigError(
            f"{key}.criterion: {rule.criterion!r} scores channels by the layers that read them. Allowed: with "
            "'channel' or 'head'"
        )
    collector = collector_of(criterion) if rule.mode == "prune" and rule.target.sparsity is not None else None
    if collector is not None:
        collector.attach(model, grouping)
    tell_what_stays(model, key, rule, grouping)
    for number, phase in enumerate(rule.phases):
        outside_phase(model, grouping, phase.layers, f"{key}.phases[{number}].layers", torch.device("cpu"))
    return ElementRule(rule, key, pattern, stacked, grouping, ElementMasks(grouping), criterion, collector)


def _grouping(model: nn.Module, key: str, rule: Rule, pattern: ElementPattern) -> Grouping:
    try:
        return pattern.build(model, rule.layers, rule.exclude)
    except (ConfigError, ModelError) as error:
        raise type(error)(f"{key}.{error}") from error


def _check_options(key: str, rule: Rule, pattern: ElementPattern) -> None:
    for name in COSTS:
        value = getattr(rule.target, name)
        if value is not None:
            raise ConfigError(
                f"{key}.target.{name}: {value} is for channels; zeros among the weights save none. Allowed: "
                "target.sparsity"
            )
    if rule.application == "remove":
        raise ConfigError(f"{key}.application: 'remove' is for channels. Allowed for {rule.pattern!r}: mask")
    if rule.multiple != 1:
        raise ConfigError(f"{key}.multiple: {rule.multiple} is for channels. Allowed for {rule.pattern!r}: 1")
    if rule.compensation != "none":
        raise ConfigError(
            f"{key}.compensation: {rule.compensation!r} is for channels. Allowed for {rule.pattern!r}: none; obs, cap "
            "and other criteria of second order compensate by themselves"
        )
    lookup("scope", rule.scope, f"{key}.scope")
    if rule.regularizer is not None:
        options = build("regularizer", rule.regularizer, f"{key}.regularizer")
        if not isinstance(options, (SlicePenalty, BlockLasso)):
            raise ConfigError(
                f"{key}.regularizer: {rule.regularizer!r} is for channels. Allowed for {rule.pattern!r}: "
                "block_lasso, slice_penalty"
            )
    for option in ("allocation", "final_sparsity"):
        value, default = getattr(rule, option), Rule.model_fields[option].default
        if value != default:
            raise ConfigError(f"{key}.{option}: {value!r} is for channels. Allowed for {rule.pattern!r}: {default!r}")
    target = rule.target.sparsity
    if target is not None and rule.mode == "prune" and target > rule.max_sparsity + 1e-9:
        raise TargetError(
            f"{key}.target.sparsity: {target} is out of reach: at most {rule.max_sparsity} of a layer goes "
            "(max_sparsity). Lower the target or raise max_sparsity"
        )
    if isinstance(pattern, NofM) and target is not None and rule.mode == "prune":
        most = pattern.drop / pattern.of
        if target > most + 1e-9:
            raise TargetError(
                f"{key}.target.sparsity: {target} is out of reach of {pattern.drop}:{pattern.of}. Allowed: at most "
                f"{most:g}"
            )
        if target < most - 1e-9:
            log.warning(
                "%s.target.sparsity: %s is below the %g of %s: only some of the windows will be %s",
                *(key, target, most, rule.pattern, rule.pattern),
            )


def has_seen(one: ElementRule) -> bool:
    """Whether what the rule's criterion needs of training has been there."""
    if one.collector is None:
        return True
    known = one.collector.tensors()
    return bool(known) and int(known.get("steps", torch.tensor(1))) > 0


def scores_of(one: ElementRule, calibration: Calibration | None = None) -> Tensor:
    """Scores of the rule's groups.

    Args:
        one: the rule.
        calibration: data for a criterion that has heard nothing of training yet.

    Raises:
        ModelError: there are NaN among them.
    """
    if one.collector is not None:
        one.collector.agree()
    statistics = _statistics(one)
    if calibration is not None and not has_seen(one):
        heard = gathered(calibration, lambda copy: _grouping(copy, one.key, one.rule, one.pattern), one.criterion)[1]
        statistics = replace(statistics, tensors=heard.tensors)
    scores_G = one.criterion.score(scorable(one.grouping, one.criterion), statistics)
    if bool(torch.isnan(scores_G).any()):
        raise ModelError(f"{one.key}.criterion: {one.rule.criterion!r} gives NaN: the weights are not finite")
    return scores_G.detach().to(one.masks.keep_G.device)


def _statistics(one: ElementRule) -> Statistics:
    known = {} if one.collector is None else one.collector.tensors()
    return Statistics(keep_G=one.masks.keep_G, tensors=known)


def decide(model: nn.Module, one: ElementRule, scores_G: Tensor, asked: Asked) -> Tensor:
    """The masks that a rule wants at one of its events; what is masked stays so.

    Args:
        model: the model.
        one: the rule.
        scores_G: importance of its groups.
        asked: what the event asks for.
    """
    outside_G = outside_phase(model, one.grouping, asked.layers, f"{one.key}.phases", scores_G.device)
    keep_G = _decide(model, one, scores_G, asked.sparsity, outside_G)
    return keep_G if outside_G is None else torch.where(outside_G, one.masks.keep_G, keep_G)


def _decide(model: nn.Module, one: ElementRule, scores_G: Tensor, sparsity: float, outside_G: Tensor | None) -> Tensor:
    removed_G = ~one.masks.keep_G if one.masks.active else None
    classes_S = classes_of(one.grouping, one.rule.scope)
    if one.window is not None:
        dims = input_dims(model, one.grouping)
        key = f"{one.key}.target.sparsity"
        return allocate_windows(
            scores_G, one.grouping, one.window, sparsity, dims, one.limits(), classes_S, removed_G, key
        )
    exempt_G = outside_G
    if one.stacked or isinstance(one.pattern, Slice):
        gone_G = pruned_channels(one.grouping, one.masks.keep_G)
        gone_G = gone_G if outside_G is None else gone_G | outside_G
        exempt_G = gone_G if bool(gone_G.any()) else None
    sizes = one.grouping.set_sizes.tolist()
    keep_G = allocate(scores_G, sizes, sparsity, one.limits(), classes_S, removed_G, exempt_G)
    refine = getattr(one.criterion, "refine", None)
    if refine is None:
        return keep_G
    refined_G: Tensor = refine(one.grouping, keep_G, _statistics(one))
    return refined_G
