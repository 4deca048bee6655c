"""A rule at work: where it stands, and when it has its next event.

Shape suffixes: ``_G`` groups of the rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pruningawaretraining.config.schema import Rule
from pruningawaretraining.criteria.base import Criterion
from pruningawaretraining.distributed.fsdp import local_of
from pruningawaretraining.engine.statistics_feed import StatisticsFeed
from pruningawaretraining.errors import ModelError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.masks.dynamics import Dynamic, Event
from pruningawaretraining.registry import build
from pruningawaretraining.schedules import Timeline, check_schedule

PHASES = ("regularize", "prune", "finetune", "done")
WORKING = ("regularize", "prune")
"""Phases in which a rule has events to come."""


@dataclass
class RuleState:
    """Where one rule stands.

    Args:
        phase: one of ``PHASES``.
        event: events so far.
        last: the last epoch (or step) with an event, or a look at whether masks are stable.
        waiting: an event that waits for gradients or activations.
        begun: when the event began whose masks are still taken in parts.
        part: parts of it that have been taken.
        opened: the epoch (or step) at which masks had become stable, for rules that wait for that.
        would: the masks that the target asked for at the last look, as long as they have not.
        initial: sparsity when the first event began, where zeros count.
        scale: what the first event divided the scores of each set by.
        first: scores of all groups before that, at the first event. Later events divide by the same scale, corrected
            for how the groups that are left have changed, so that those that are gone do not change how layers compare.
        latencies: predicted and measured at every event of a latency target.
        member: members of a family whose target has been met.
        holds: whether the last of them is still what the model is: it is fine-tuned until the next event.
    """

    phase: str = "regularize"
    event: int = 0
    last: int | None = None
    waiting: int | None = None
    begun: int | None = None
    part: int = 0
    opened: int | None = None
    would: Tensor | None = None
    initial: float = 0.0
    scale: list[float] | None = None
    first: Tensor | None = None
    latencies: list[dict[str, Any]] = field(default_factory=list)
    member: int = 0
    holds: bool = False


@dataclass(eq=False)
class ActiveRule:
    """A rule of one model.

    Args:
        key: how messages call it.
        given: the configuration.
        pattern: its pattern, built.
        criterion: what scores its groups.
        names: of the members of a family, as the user has written them; more than members where a file has met some.
        members: the configuration of each member of a family; that of the rule alone without one.
        feed: gathers what the criterion needs.
        timelines: when each member has its events, and how far each goes, if it begins at start.
        state: where it stands.
        fractions: the fraction of each of its sets that is to go, where the config gives them one by one.
        dynamic: what masked weights do meanwhile.
        gradient_G: sums of squared gradients of its groups, where an event waits for them.
        next_G, scores_G: the masks that an event in parts leads to, and the scores that order it.
    """

    key: str
    given: Rule
    pattern: Any
    criterion: Criterion
    names: tuple[str, ...] = field(init=False)
    members: tuple[Rule, ...] = field(init=False)
    timelines: tuple[Timeline, ...] = field(init=False)
    dynamic: Dynamic = field(init=False)
    feed: StatisticsFeed = field(init=False)
    state: RuleState = field(default_factory=RuleState, init=False)
    fractions: tuple[float, ...] | None = field(default=None, init=False)
    next_G: Tensor | None = field(default=None, init=False)
    scores_G: Tensor | None = field(default=None, init=False)
    gradient_G: Tensor | None = field(default=None, init=False)
    _opened: tuple[Timeline, int, Timeline] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.names = tuple(self.given.target.names)
        self.aim(self.given)
        for name in {stretch.schedule for times in self.timelines for stretch in times.stretches}:
            check_schedule(name)  # one of the user's own that fails is refused before training
        self.dynamic = build("dynamic", self.given.dynamic, f"{self.key}.dynamic")

    def aim(self, rule: Rule) -> None:
        """Follow a configuration from its first member on."""
        self.given, self.members = rule, rule.members()
        self.count(None)

    def count(self, steps: int | None) -> None:
        """Let events at fractions of epochs know how many steps an epoch has."""
        self.timelines = tuple(one.timeline(steps) for one in self.members)

    @property
    def rule(self) -> Rule:
        """The configuration with the target, start and end of the member that comes next, or was the last."""
        return self.members[self._member]

    @property
    def times(self) -> Timeline:
        """When that member has its events, and how far each goes."""
        planned, opened = self.timelines[self._member], self.state.opened
        if opened is None:
            return planned
        if self._opened is None or self._opened[0] is not planned or self._opened[1] != opened:
            self._opened = planned, opened, planned.beginning(opened)
        return self._opened[2]

    @property
    def _member(self) -> int:
        """Number of the member that comes next, or was the last."""
        return min(self.state.member, len(self.members) - 1)

    @property
    def before(self) -> Rule | None:
        """The configuration of the member before it."""
        return self.members[self.state.member - 1] if self.state.member else None

    @property
    def phase(self) -> str:
        """Where it stands, of :data:`PHASES`: a member that holds is fine-tuned, once all of its masks are in force."""
        known = "finetune" if self.state.holds else self.state.phase
        return "prune" if self.pending and known == "finetune" else known

    @property
    def pending(self) -> bool:
        """Whether masks of an event are still to come into force."""
        return self.next_G is not None

    def complete(self) -> None:
        """Put masks in force that a dynamic is on the way to."""

    @property
    def held(self) -> str:
        """Name of the member that the model is now; "" without one."""
        return self.names[self.state.member - 1 - len(self.members)] if self.state.holds else ""

    @property
    def missed(self) -> tuple[str, ...]:
        """Names of the members that are not met yet."""
        return self.names[len(self.names) - len(self.members) + self.state.member :]

    def settled(self, met: bool) -> RuleState:
        """Where it stands once an event is over: a target that is met ends the rule, or begins the fine-tuning of a
        member."""
        state = replace(self.state)
        state.phase = "finetune" if met and state.member + 1 >= len(self.members) else "prune"
        if met and self.given.target.lists:
            state.member, state.holds = state.member + 1, True
        return state

    @property
    def waits(self) -> bool:
        """Whether it looks for stable masks before its first event."""
        return self.rule.stable is not None and self.state.opened is None

    @property
    def works(self) -> bool:
        """Whether the rule has events to come."""
        return self.rule.enabled and self.state.phase in WORKING

    @property
    def gathers(self) -> bool:
        """Whether an event to come needs scores."""
        return self.works and self.rule.mode == "prune" and self.rule.aims

    @property
    def compensates(self) -> bool:
        """Whether layers that read what is masked are changed to make up for it."""
        return self.rule.compensation != "none"

    def due(self, now: int) -> bool:
        """Whether an epoch or step has an event: at start and every ``every`` from there on, once each."""
        aimless = self.rule.mode == "prune" and not self.rule.aims
        waits = self.state.waiting is not None and not self.state.waiting < now == self.times.last
        if not self.works or aimless or waits:  # the last event takes the place of one that waits
            return False
        return self.times.is_event(now) and (self.state.last is None or now > self.state.last)

    def asks(self, steps: range, last: bool) -> bool:
        """Whether it matters for an event, or a part of one, which of these is the number of real steps.

        Args:
            steps: what the number may be.
            last: only the last event of the schedule counts.
        """
        if self.times.counts != "step" or (last and self.times.last not in steps):
            return False
        coming = steps[max(0, self.times.first - steps.start) :]
        return (self.next_G is not None and not last) or any(self.due(now) for now in coming)

    def is_last(self, now: int) -> bool:
        """Whether an event is the last of the schedule."""
        return now >= self.times.last

    def asked(self, now: int) -> float:
        """The sparsity that the event at ``now`` asks for."""
        return self.times.sparsity(now, self.reached)

    @property
    def reached(self) -> float:
        """The sparsity that its schedule goes on from: of the member before, or what was there at the first event."""
        before = 0.0 if self.before is None else self.before.target.last_sparsity or 0.0
        return max(self.state.initial, before)

    def event(
        self, now: int, grouping: Grouping, keep_G: Tensor, scores_G: Tensor, sparsity: float, number: int
    ) -> Event:
        """The event at ``now``, as the rule's dynamic sees it.

        Args:
            now: the epoch or step.
            grouping: the rule's groups.
            keep_G: its masks.
            scores_G: the scores of its groups.
            sparsity: what it asks for.
            number: how many events there were before it.
        """
        last, progress = self.is_last(now), self.times.progress(now)
        elapsed = (now - self.times.first) / max(1, self.times.last - self.times.first)
        return Event(grouping, keep_G, scores_G, number, last, progress, sparsity, self.gradient_G, min(elapsed, 1.0))

    @property
    def listens(self) -> bool:
        """Whether its events look at gradients of masked weights; those of coupled groups do not."""
        return False

    def await_gradients(self, now: int) -> None:
        """The event at ``now`` waits for the gradients of the next step."""
        self.state.waiting = now

    def observe_masked(self) -> None:
        """Gradients are complete: keep those of masked weights, where an event waits for them."""

    @property
    def parts(self) -> int:
        """In how many parts the masks of an event are taken."""
        return int(min(self.rule.progressive, self.rule.every))


@dataclass(frozen=True)
class Decision:
    """The masks that an event wants.

    Args:
        keep_G: the rule's new masks (True = keep).
        met: whether its target is met with them.
        scores_G: what the groups were ranked by, where parts of the event follow that order.
    """

    keep_G: Tensor
    met: bool
    scores_G: Tensor | None = None


def check_finite(key: str, grouping: Grouping) -> None:
    """Refuse to prune weights that are not finite: no score means anything then.

    Raises:
        ModelError: it names the rule and a weight.
    """
    weights = {member.name: local_of(member.parameter.detach()) for member in grouping.members}
    sums = [one.sum(dtype=torch.float32) for one in weights.values()]  # not finite where a weight is not
    together = torch.stack([one.to(sums[0].device) for one in sums]).cpu()  # the host waits once
    for (name, weight), total in zip(weights.items(), together.tolist(), strict=True):
        if not math.isfinite(total) and not bool(torch.isfinite(weight).all()):  # large weights only add up to infinity
            raise ModelError(f"{key}: {name} is not finite: the training has diverged, and nothing is pruned")
