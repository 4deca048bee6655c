"""Rules inside layers: each with its groups and masks.

Shape suffixes: ``_G`` groups of one rule.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.config.schema import Rule
from pruningawaretraining.engine.phases import outside_phase
from pruningawaretraining.engine.rule import ActiveRule
from pruningawaretraining.errors import ConfigError, ModelError, TargetError
from pruningawaretraining.groups.grouping import Grouping, Member
from pruningawaretraining.groups.views import slot_sums
from pruningawaretraining.masks.masks import Masks
from pruningawaretraining.registry import calling, check_returned

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class WeightRule(ActiveRule):
    """A rule with its groups and masks.

    Args:
        grouping, masks: its groups, and which of them are masked.
        stacked: whether a rule for channels works on the same layers.
    """

    grouping: Grouping
    masks: Masks
    stacked: bool = False

    @property
    def sparsity(self) -> float:
        """Fraction of its groups that are masked."""
        return 1.0 - sum(self.masks.kept_by_set) / self.grouping.size if self.grouping.size else 0.0

    @property
    def pending(self) -> bool:
        """Whether masks of an event are still to come into force: in parts, or once groups have faded."""
        return super().pending or self.masks.next_G is not None

    def complete(self) -> None:
        """Mask what is fading."""
        if self.masks.next_G is not None:
            next_G, self.masks.next_G = self.masks.next_G, None
            self.masks.set(next_G)

    @property
    def listens(self) -> bool:
        """Whether its dynamic looks at gradients of masked weights."""
        return self.dynamic.listens

    def await_gradients(self, now: int) -> None:
        """The event at ``now`` waits; gradients of masked weights pass, where it asks for them."""
        super().await_gradients(now)
        if self.listens:
            self.masks.passing = True

    def observe_masked(self) -> None:
        """Sum the squared gradients of its groups, where an event waits for them; their scale does not matter."""
        if self.listens and self.masks.passing:
            self.gradient_G = torch.cat([_squares(member) for member in self.grouping.members])

    def norms(self) -> dict[str, Tensor]:
        """L2 norms of its groups by the name of their weight, on the CPU."""
        return {
            member.name: slot_sums(member, member.parameter.detach().float().square()).sqrt().cpu()
            for member in self.grouping.members
        }


def _squares(member: Member) -> Tensor:
    """Sums of squared gradients of a member's slots; zeros if it has no gradient."""
    gradient_W = member.parameter.grad
    if gradient_W is None or gradient_W.layout is not torch.strided:
        gradient_W = torch.zeros_like(member.parameter)
    return slot_sums(member, gradient_W.detach().float().square())


def grouping_of(model: nn.Module, key: str, rule: Rule, pattern: Any) -> Grouping:
    """The groups of a rule's layers; errors name the rule."""
    try:
        with calling("pattern", pattern, "a Grouping"):
            grouping = pattern.build(model, rule.layers, rule.exclude)
    except (ConfigError, ModelError) as error:
        raise type(error)(f"{key}.{error}") from error
    check_returned(isinstance(grouping, Grouping), "pattern", pattern, grouping, "a Grouping")
    found: Grouping = grouping
    problem = fault_of(found)
    check_returned(not problem, "pattern", pattern, found, "every weight in one group at most", problem)
    return found


def fault_of(grouping: Grouping) -> str:
    """Why groups inside layers cannot be pruned, or "": each weight may be in one of them at most."""
    seen: dict[int, str] = {}
    end = 0
    for one in grouping.sets:
        if one.start != end:
            return f"sets that do not follow each other: {one.name!r} begins at group {one.start}, not {end}"
        end = one.stop
    for member in grouping.members:
        if id(member.parameter) in seen:
            return f"groups that overlap: {member.name} is labelled twice, as {seen[id(member.parameter)]} before"
        seen[id(member.parameter)] = member.name
        lengths = [None if label is None else len(label) for label in member.labels]
        wrong = [one for one, size in zip(lengths, member.parameter.shape, strict=False) if one not in (None, size)]
        if len(lengths) != member.parameter.dim() or wrong:
            return f"labels of lengths {lengths} for {member.name} of shape {tuple(member.parameter.shape)}"
        for dim, (label, size) in enumerate(zip(member.labels, member.sizes, strict=True)):
            low, high = (0, 0) if label is None or not len(label) else (int(label.min()), int(label.max()))
            if not 0 <= low <= high <= size:
                where = f"{member.name} along dimension {dim}"
                return f"labels from {low} to {high} of {where}, where 0 to {size} are allowed"
    slots, size = sum(member.n_slots for member in grouping.members), grouping.size
    return "" if slots == size else f"{slots} labels for {size} groups"


def check_target(key: str, rule: Rule, pattern: Any) -> None:
    """Refuse a sparsity that the rule's limits or pattern leave out of reach.

    Raises:
        TargetError: it says how far the rule can go.
    """
    target = rule.target.last_sparsity
    if target is None or rule.mode != "prune":
        return
    if target > rule.max_sparsity + 1e-9:
        raise TargetError(
            f"{key}.target.sparsity: {target} is out of reach: at most {rule.max_sparsity} of a layer goes "
            "(max_sparsity). Lower the target or raise max_sparsity"
        )
    window = getattr(pattern, "window", None)
    if window is None:
        return
    most = window[0] / window[1]
    if target > most + 1e-9:
        raise TargetError(
            f"{key}.target.sparsity: {target} is out of reach of {window[0]}:{window[1]}. Allowed: at most {most:g}"
        )
    if target < most - 1e-9:
        logger.warning(
            "%s.target.sparsity: %s is below the %g of %s: only some of the windows will be %s",
            *(key, target, most, rule.pattern, rule.pattern),
        )


def same_tensors(old: Grouping, new: Grouping) -> bool:
    """Whether two groupings label the same tensors."""
    before, after = old.members, new.members
    return len(before) == len(after) and all(a.parameter is b.parameter for a, b in zip(before, after, strict=True))


def check_lifted(one: WeightRule, rules: Iterable[WeightRule]) -> None:
    """Refuse to lift masks that another rule of the same config makes: a rule lifts its own, from a state.

    Raises:
        ConfigError: it names both rules and a layer.
    """
    own = {each.name for each in one.grouping.sets}
    for other in rules if one.rule.mode == "unprune" else ():
        shared = [each.name for each in other.grouping.sets if each.name in own]
        if other is not one and shared:
            raise ConfigError(
                f"{one.key}.mode: 'unprune' lifts masks that a loaded state brings, and {other.key} prunes "
                f"{shared[0]!r} in the same config. Allowed: release: true in {other.key}, which lifts its masks after "
                "its last event; or 'unprune' alone, and load_state_dict() of the pruned run"
            )


def check_phases(model: nn.Module, key: str, rule: Rule, grouping: Grouping) -> None:
    """Refuse phases that name layers which are not the rule's.

    Raises:
        ConfigError: it names the phase.
    """
    for number, phase in enumerate(rule.phases):
        outside_phase(model, grouping, phase.layers, f"{key}.phases[{number}].layers", torch.device("cpu"))
