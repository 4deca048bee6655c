"""Phases of a rule: the times of its events, and the sparsity of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, WithJsonSchema, field_validator, model_validator
from typing_extensions import Self  # noqa: UP035  (in typing from 3.11 on)

from pruningawaretraining.config.checks import layer_name
from pruningawaretraining.config.strict import Fraction, Moment, Pace, Strict, UnitInterval
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.registry import canonical, names
from pruningawaretraining.schedules import PRESENT, Stretch

Initial = UnitInterval | Literal["present"] | None
OWN = ("start", "end", "every", "schedule", "initial")
"""Fields of a rule that its phases have instead."""
STABLE = 0.95
"""Agreement of masks at which ``start: stable`` begins."""
Start = Annotated[Moment, WithJsonSchema({"anyOf": [{"type": "number"}, {"const": "stable"}]})]


def check_moments(unit: str, moments: dict[str, float]) -> None:
    """Refuse fractions of a step.

    Raises:
        ConfigError: names the key.
    """
    for key, moment in moments.items():
        if unit == "step" and moment != int(moment):
            raise ConfigError(f"{key}: {moment} is not allowed. Allowed: a whole number of steps")


def check_initial(initial: float | str | None, final: float | None) -> None:
    """Refuse a schedule that would go down.

    Raises:
        ConfigError: the initial sparsity is above the final one, or the final one is missing.
    """
    if initial is None:
        return
    if final is None:
        raise ConfigError(f"initial: {initial} requires target.sparsity. Allowed: leave it out")
    if initial != PRESENT and float(initial) > final:
        raise ConfigError(f"initial: {initial} is above the final sparsity. Allowed: at most {final}")


class Phase(Strict):
    """One phase of a rule's schedule: from an initial sparsity to a final one."""

    start: Moment = Field(description="First epoch (or step) of the phase; epochs may be fractions.")
    end: Moment = Field(description="Epoch (or step) at which its sparsity is due.")
    every: Pace = Field(1, description="Epochs (or steps) between one event and the next, above 0.")
    schedule: str = Field("linear", description="How the sparsity grows.")
    initial: Initial = Field(
        None, description="As a rule's: sparsity of the event at start; absent: the phase before has left some."
    )
    sparsity: Fraction = Field(description="Sparsity that the phase ends with, in (0, 1].")
    layers: list[str] | None = Field(
        None, description="Layers of the rule that this phase prunes, written as in 'layers'; absent: all of them."
    )

    @field_validator("schedule")
    @classmethod
    def _is_schedule(cls, value: str) -> str:
        return canonical("schedule", value, "schedule") if names("schedule") else value

    @field_validator("layers", mode="before")
    @classmethod
    def _are_layers(cls, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not value:
            raise ConfigError(f"layers: {value!r} is not a list of one layer name or more")
        return [layer_name(entry, f"layers[{number}]") for number, entry in enumerate(value)]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.end < self.start:
            raise ConfigError(f"end: {self.end} is before start. Allowed: start ({self.start}) or later")
        check_initial(self.initial, self.sparsity)
        return self

    def stretch(self) -> Stretch:
        """The phase as what has its arithmetic."""
        layers = None if self.layers is None else tuple(self.layers)
        return Stretch(self.start, self.end, self.every, self.schedule, self.initial, self.sparsity, layers)


def read_start(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a rule, with ``start: stable`` as numbers."""
    if values.get("start") != "stable":
        return dict(values)
    return {"stable": STABLE, **values, "start": 0}


class Waiting(Protocol):
    """The fields of a rule that has to wait for stable masks."""

    @property
    def stable(self) -> float | None: ...

    @property
    def end(self) -> float | None: ...

    @property
    def phases(self) -> list[Phase]: ...

    @property
    def at_init(self) -> bool: ...

    @property
    def mode(self) -> str: ...


def check_stable(rule: Waiting) -> None:
    """Refuse to wait for stable masks where nothing is chosen, or without a moment by which to begin.

    Raises:
        ConfigError: names the key.
    """
    if rule.stable is None:
        return
    if rule.end is None and not rule.phases:
        raise ConfigError(f"stable: {rule.stable} requires end, by which pruning begins in any case")
    others = {"phases": rule.phases, "at_init": rule.at_init, "mode": rule.mode}
    for key, allowed in {"phases": [], "at_init": False, "mode": "prune"}.items():
        if others[key] != allowed:
            shown = f"{len(rule.phases)} of them" if key == "phases" else repr(others[key])
            raise ConfigError(f"{key}: {shown} cannot be combined with stable. Allowed: {allowed!r}")


def check_phases(phases: list[Phase], own: dict[str, Any], final: float | None, unit: str) -> None:
    """Refuse phases that overlap, end elsewhere than the rule, or stand beside a schedule of the rule's own.

    Args:
        phases: in order.
        own: fields of :data:`OWN` of the rule that are not as they are by default.
        final: the rule's target.sparsity.
        unit: what they count.

    Raises:
        ConfigError: names the phase.
    """
    for key, value in own.items():
        raise ConfigError(f"{key}: {value!r} stands beside phases. Allowed: leave it out, each phase has its own")
    for number, (one, after) in enumerate(zip(phases, phases[1:], strict=False), start=1):
        if after.start < one.end:
            raise ConfigError(f"phases[{number}].start: {after.start} is before the end of the phase before, {one.end}")
    for number, one in enumerate(phases):
        moments = {"start": one.start, "end": one.end, "every": one.every}
        check_moments(unit, {f"phases[{number}].{key}": value for key, value in moments.items()})
    if phases and final != phases[-1].sparsity:
        raise ConfigError(f"target.sparsity: {final} is not that of the last phase. Allowed: {phases[-1].sparsity}")
