"""Times of a rule: its events, and the members of its family."""

from __future__ import annotations

from typing import Any

from pruningawaretraining.config.family import Span
from pruningawaretraining.schedules import Stretch, Timeline


class Timed:
    """The times of a rule; the fields are those of :class:`~pruningawaretraining.config.schema.Rule`."""

    @property
    def span(self: Any) -> Span:
        """When the members of a family have their events; of one member without a family."""
        end = self.start if self.end is None or self.at_init else self.end
        return Span(self.start, end, self.every, self.hold, len(self.target.members()))

    def members(self: Any) -> tuple[Any, ...]:
        """One rule for each member of a family, with its own target, start and end; only this rule without a family."""
        if not self.target.lists:
            return (self,)
        own = zip(self.target.members(), self.span.bounds(), strict=True)
        return tuple(self.model_copy(update={"target": one, "start": a, "end": b}) for one, (a, b) in own)

    def timeline(self: Any, steps: int | None = None) -> Timeline:
        """When its events are, and how far each goes.

        Args:
            steps: optimizer steps of an epoch, where they are known; steps_per_epoch goes first.
        """
        final = self.target.last_sparsity or self.final_sparsity or 1.0
        own = (Stretch(a, b, self.every, self.schedule, self.initial, final) for a, b in self.span.bounds())
        stretches = tuple(phase.stretch() for phase in self.phases) or tuple(own)
        return Timeline(self.unit, stretches, self.steps_per_epoch or steps)
