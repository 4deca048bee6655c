"""The engine: at every event of every rule, statistics -> scores -> masks -> agreement -> compensation -> removal.

Shape suffixes: ``_G`` groups of one rule.

An event of a rule takes place in an epoch's ``prune`` or at a step, once each. Where its criterion needs gradients or
activations and none has been seen, it waits for the first ones, which come before the weights move.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from pruningawaretraining.criteria.second_order import Calibration
from pruningawaretraining.distributed.collectives import agreed
from pruningawaretraining.engine.commit import Commit, event_of, leave_member
from pruningawaretraining.engine.context import RemovalContext
from pruningawaretraining.engine.coupled import CoupledGroups
from pruningawaretraining.engine.domain import Domain
from pruningawaretraining.engine.dynamics import observe
from pruningawaretraining.engine.observing import Observing
from pruningawaretraining.engine.parts import advance, complete, complete_all, settle
from pruningawaretraining.engine.penalties import ActivePenalties
from pruningawaretraining.engine.phases import tell_of_nothing
from pruningawaretraining.engine.removal import remove_masked
from pruningawaretraining.engine.rule import PHASES, ActiveRule
from pruningawaretraining.engine.stability import opens
from pruningawaretraining.engine.weights import WeightGroups
from pruningawaretraining.masks.masks import Masks
from pruningawaretraining.masks.penalties import Regularizer
from pruningawaretraining.models.calling import full_precision


class Engine(Observing):
    """Drives all rules of one model.

    Args:
        model: the model.
        coupled: groups that can be removed, or None.
        weights: groups inside layers, or None.
        context: gives what has to follow a mask or a removal.
    """

    def __init__(
        self,
        model: nn.Module,
        coupled: CoupledGroups | None,
        weights: WeightGroups | None,
        context: Callable[[], RemovalContext],
    ) -> None:
        self.model, self.coupled, self.weights = model, coupled, weights
        super().__init__()
        self._context, self._observed = context, False
        self.penalties = ActivePenalties(model)

    @property
    def domains(self) -> list[Domain]:
        """Removable groups first: what is inside layers follows what is left of them."""
        return [one for one in (self.coupled, self.weights) if one is not None]

    @property
    def rules(self) -> list[ActiveRule]:
        """All rules, in the order in which they have their events."""
        return [one for domain in self.domains for one in domain.rules]

    @property
    def masks(self) -> list[Masks]:
        """Every mask that acts in a step."""
        own = [] if self.weights is None else self.weights.masks
        return own if self.coupled is None else [self.coupled.masks, *own]

    @property
    def phase(self) -> str:
        """The earliest phase of any rule."""
        return min((one.phase for one in self.rules), key=PHASES.index, default="done")

    # --- events -------------------------------------------------------------------------------------------------

    def calibrate(self, calibration: Calibration) -> None:
        """Give criteria and compensation data of their own; events that waited for gradients take place.

        Raises:
            ConfigError: a criterion cannot prune its pattern with data of its own.
        """
        for domain in self.domains:
            domain.check(calibration)
        self.calibration = calibration
        self.follow_phases()
        self.fire_waiting()

    def at_init(self) -> list[str]:
        """Let rules that begin with the pruner have their one event."""
        return self._each(lambda one: one.rule.at_init and one.rule.start <= 0 and one.due(one.times.first), None)

    def prune(self, epoch: int) -> list[str]:
        """Let every rule that counts epochs have the event or part that is due.

        Returns:
            One line for each thing that happened.
        """
        for domain in self.domains:
            domain.check(self.calibration)
        return self.tick("epoch", epoch)

    def tick(self, unit: str, now: int, last: bool = False) -> list[str]:
        """Let every rule that counts in ``unit`` ("epoch" or "step") have the event or part that is due.

        Args:
            unit: what ``now`` counts.
            now: the epoch, or how many real steps there have been.
            last: only the last event of a schedule, which no further step may follow.
        """
        if last:
            return self._each(lambda one: one.times.counts == unit and now == one.times.last and one.due(now), now)
        return self._each(lambda one: one.times.counts == unit, now)

    def _each(self, chosen: Callable[[ActiveRule], bool], now: int | None) -> list[str]:
        """Events of the chosen rules; a removal in one domain may give the next one other rules."""
        lines: list[str] = []
        for domain in self.domains:
            for number in range(len(domain.rules)):
                one = domain.rules[number]
                if chosen(one):
                    at = one.times.first if now is None else now
                    advance(domain, one, at, self._context)
                    lines += self._fire(domain, one, at) if one.due(at) else []
        return lines

    def asks(self, steps: range, last: bool = False) -> bool:
        """Whether it matters for any event which of these is the number of real steps."""
        return any(one.asks(steps, last) for one in self.rules)

    def fire_waiting(self, hears: bool = True) -> list[str]:
        """Let events that wait take place; ``hears``: whether gradients of masked weights may still come."""
        lines: list[str] = []
        for domain in self.domains:
            for number in range(len(domain.rules)):
                if (now := domain.rules[number].state.waiting) is not None:
                    lines += self._fire(domain, domain.rules[number], now, hears)
        return lines

    def _fire(self, domain: Domain, one: ActiveRule, now: int, hears: bool = True) -> list[str]:
        domain.check(self.calibration)
        if not (domain.ready(one, now, self.calibration) if hears else one.feed.ready(self.calibration)):
            one.await_gradients(now)
            return []
        context = self._context()
        aside = nullcontext() if self.calibration is None else self.paused()  # the data is no training
        try:
            with aside, full_precision(self.model), event_of(self, one, context.optimizers) as commit:
                leave_member(self, one, context)
                if one.waits and not opens(domain, one, now, self.calibration):
                    return []
                lines = self._take(domain, one, now, context, commit)
        finally:
            self.follow_phases()
        lines[0] += f"; member {one.held} is reached" if one.held else ""
        return lines

    def _take(self, domain: Domain, one: ActiveRule, now: int, context: RemovalContext, commit: Commit) -> list[str]:
        """The masks of an event, and the removal that comes with them."""
        if one.state.event == 0:
            domain.begin(one, context)
        decision = domain.decide(one, now, self.calibration)
        keep_G, met_1 = agreed(decision.keep_G, torch.tensor([decision.met]))
        commit.met = bool(met_1)
        tell_of_nothing(one.key, one.rule, keep_G, commit.met)
        one.state.event, one.state.last = one.state.event + 1, now
        one.state.phase = "prune"
        if one.parts > 1 and decision.scores_G is not None:
            one.next_G, one.scores_G, one.state.begun, one.state.part = keep_G, decision.scores_G, now, 0
            advance(domain, one, now, self._context)
        else:
            settle(one)
            domain.put(one, keep_G, context, self.calibration)
            self.apply_masks()
        lines = [f"{one.key}: {one.times.counts} {now}: {' '.join(domain.summary(one))}"]
        if commit.met and one.rule.release:
            complete(domain, one, context)
            domain.mask(one, torch.ones_like(keep_G), context.optimizers)
            lines[0] += "; masks lifted"
        lines += self._remove_at(domain, one, now, context, commit)
        commit()
        return lines

    def _remove_at(
        self, domain: Domain, one: ActiveRule, now: int, context: RemovalContext, commit: Commit
    ) -> list[str]:
        """Remove at an event what can be removed then."""
        if not domain.removable or self.coupled is None:
            return []
        where = f"{one.key}: {one.times.counts} {now}"
        if self.coupled.sharded and commit.met:
            return [f"{where}: the target is met; gathered() removes what is masked"]
        if not commit.met and one.rule.application != "remove":
            return []
        with self.paused():
            remove_masked(self, context, commit)
        return [f"{where}: removed, {domain.summary(one)[1]}"]

    def remove(self) -> None:
        """Remove what is masked now, whatever the schedule says; zeros inside a weight stay there.

        Raises:
            ModelError: the removed model does not compute what the masked one did; everything is put back first.
        """
        if self.coupled is not None:
            with self.paused(), full_precision(self.model):
                remove_masked(self, self._context(), Commit())

    def after_removal(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Groups have been removed: rules inside layers and regularisers follow."""
        self.penalties.forget()
        if self.weights is not None:
            self.weights.rebuild(optimizers)
            self.follow_phases()

    # --- steps --------------------------------------------------------------------------------------------------

    def on_round(self) -> list[tuple[Regularizer, Tensor]]:
        """A real step begins: gradients are complete and no weight has moved.

        Returns: each active regulariser of the gradients, with its factors at these weights.
        """
        self._observed = False
        for one in self.masks:
            one.settle()
        return self.gradient_penalties()

    def on_gradients(self, scale: Tensor | float) -> list[str]:
        """Observe the gradients once in a real step; events that waited for them take place.

        Args:
            scale: what the gradients are still multiplied with.
        """
        if not self._observed:
            observe(self.rules, scale)
            self._observed = True
        return self.fire_waiting()

    def shrink(self, fresh: Tensor | int, rates: Callable[[], Mapping[int, Tensor | float]]) -> None:
        """Weights have moved: regularisers that act on them do so.

        Args:
            fresh: 1 if that makes a real step, else 0.
            rates: gives learning rates by the ids of parameters.
        """
        if self.weights is not None:
            self.penalties.shrink(self.weights, fresh, rates)

    def apply_masks(self) -> None:
        """Set masked weights to exactly 0."""
        for one in self.masks:
            one.apply()

    def mask_gradients(self, only: set[int] | None = None) -> None:
        """Set the gradients of masked weights to 0: of the parameters with these ids, or of all."""
        for one in self.masks:
            one.apply_to_gradients(only)

    def gradient_penalties(self) -> list[tuple[Regularizer, Tensor]]:
        """Every active regulariser of the gradients with its factors at these weights."""
        return [] if self.coupled is None else self.penalties.of_gradients(self.coupled)

    def loss_penalty(self, ended: bool = False) -> Tensor:
        """The differentiable penalty of all rules that have one and are not done; 0 once training has ended."""
        return self.penalties.of_loss(None if ended else self.weights)

    def finish(self) -> None:
        """Training ends: events in parts are completed, and nothing is observed any more."""
        complete_all(self.domains, self._context)
        self._listens = False
        self.release()

    def rebind(self) -> None:
        """Take the model's parameters as they are now, by their names: ``fully_shard`` has exchanged them.

        Raises:
            ConfigError: a rule cannot follow.
        """
        for domain in self.domains:
            domain.rebind(self.calibration)
        self.penalties.forget()
