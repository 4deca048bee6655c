"""Families: a target with a list of numbers, so that one run stops at several models of different sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from pruningawaretraining.config.strict import Moment, within
from pruningawaretraining.errors import ConfigError

ROUNDING = 1e-9
MOST = 100
"""Members of a family."""


def _up_to_one(value: float) -> bool:
    return 0 < value <= 1


@dataclass(frozen=True)
class Series:
    """The values of a target of one kind, one for each member of a family.

    Attributes:
        one: check of a single number, not of a list.
        allowed: words for the numbers of a list.
        accepts: whether a number may be in a list.
        rises: whether they grow from member to member; else they fall.
        what: words for the values.
    """

    one: Any
    allowed: str
    accepts: Callable[[float], bool]
    rises: bool = False
    what: str = "decreasing fractions"

    def checked(self, value: Any) -> Any:
        """A single number as it is; a list only if each of its numbers lies beyond the one before."""
        if not isinstance(value, (list, tuple)):
            return self.one.func(value)
        if not 1 <= len(value) <= MOST:
            raise ValueError(f"a list of {len(value)} is not allowed. Allowed: 1 to {MOST} {self.what}")
        for before, one in zip((None, *value), value, strict=False):
            if isinstance(one, bool) or not isinstance(one, (int, float)) or not self.accepts(one):
                raise ValueError(f"{one!r} in a list is not allowed. Allowed: {self.allowed}")
            if before is not None and (one <= before if self.rises else one >= before):
                raise ValueError(f"{one!r} does not follow {before!r} in a list. Allowed: {self.what}")
        return list(value)


def _below_one(value: float) -> bool:
    return 0 < value < 1


def _finite(value: float) -> bool:
    return 0 < value < math.inf


KEPT = Series(within("a number in (0, 1], or a list of decreasing ones", _up_to_one), "numbers in (0, 1)", _below_one)
REMOVED = Series(
    within("a number in (0, 1], or a list of increasing ones", _up_to_one),
    "numbers in (0, 1)",
    _below_one,
    rises=True,
    what="increasing fractions",
)
TIMES = Series(
    within("a number above 0, or a list of decreasing ones", _finite),
    "numbers above 0",
    _finite,
    what="decreasing milliseconds",
)
_PROPER = Annotated[float, Field(gt=0, lt=1)]
_LIMIT = Annotated[float, Field(gt=0, le=1)]
_POSITIVE = Annotated[float, Field(gt=0)]
Fractions = Annotated[_LIMIT | list[_PROPER], BeforeValidator(KEPT.checked)]
"""A fraction to keep, or the decreasing fractions of a family."""
Sparsities = Annotated[_LIMIT | list[_PROPER], BeforeValidator(REMOVED.checked)]
"""A fraction to remove, or the increasing fractions of a family."""
Milliseconds = Annotated[_POSITIVE | list[_POSITIVE], BeforeValidator(TIMES.checked)]
"""A latency, or the decreasing ones of a family."""
Hold = Annotated[Moment, within("a number of 0 or more", lambda value: 0 <= value < math.inf)]


def member_name(key: str, value: float) -> str:
    """``macs, 0.7 -> "0.70"``: two decimals, or as many as it has; ``latency_ms, 8.5 -> "8.5ms"``."""
    if key == "latency_ms":
        return f"{value!r}ms" if value != int(value) else f"{int(value)}ms"
    text = f"{value:.2f}" if round(value, 2) == value else f"{value!r}"
    return f"sparsity-{text}" if key == "sparsity" else text


@dataclass(frozen=True)
class Span:
    """When the events of a family take place.

    Args:
        start, end, every: of the rule.
        hold: as the rule says it, or None.
        members: how many there are.
    """

    start: float
    end: float
    every: float
    hold: float | None
    members: int

    @property
    def gap(self) -> float:
        """From the last event of a member to the first one of the next."""
        return max(self.hold or 0, self.every)

    @property
    def needed(self) -> float:
        """The least ``end``: an event for each member."""
        return self.start + (self.members - 1) * self.gap

    def bounds(self) -> list[tuple[float, float]]:
        """(first event, last event) of each member; the members share the events evenly, the first ones get more."""
        if self.members == 1:
            return [(self.start, self.end)]
        steps = math.floor((self.end - self.needed) / self.every + ROUNDING)
        found, first = [], self.start
        for number in range(self.members):
            last = first + (steps // self.members + (number < steps % self.members)) * self.every
            found.append((first, last))
            first = last + self.gap
        return found


def check_lengths(lists: Mapping[str, Sequence[float]]) -> None:
    """Refuse lists of different lengths in one target.

    Raises:
        ConfigError: it names both.
    """
    (first, known), *others = lists.items()
    for name, values in others:
        if len(values) != len(known):
            raise ConfigError(
                f"{name}: {len(values)} numbers, and {first} has {len(known)}. Allowed: equally many, one for each "
                "member of the family"
            )


def check_family(rule: Any) -> None:
    """Refuse a family that does not fit its rule, and ``hold`` without one.

    Args:
        rule: of a config.

    Raises:
        ConfigError: it names the key.
    """
    if not rule.target.lists:
        if rule.hold is not None:
            raise ConfigError(f"hold: {rule.hold} requires a target with a list, such as macs: [0.7, 0.5]")
        return
    alone: dict[str, Any] = {
        "phases": [],
        "final_sparsity": None,
        "initial": None,
        "at_init": False,
        "release": False,
        "mode": "prune",
        "stable": None,
    }
    for key, default in alone.items():
        if getattr(rule, key) != default:
            raise ConfigError(f"{key}: {getattr(rule, key)!r} does not go with a list of targets. Allowed: {default!r}")
    hold, every = rule.hold, rule.every
    if hold is not None and hold != int(hold) and every == int(every):
        raise ConfigError(f"hold: {hold} is not allowed where every is {every}. Allowed: a whole number")
    span = rule.span
    if span.end < span.needed:
        raise ConfigError(
            f"end: {rule.end} is too early for {span.members} members, {span.gap:g} {rule.unit}s apart. Allowed: "
            f"{span.needed:g} or later, a shorter hold, or fewer members"
        )


def check_one_family(rules: Sequence[Any]) -> None:
    """Refuse a second rule with a family: members are models, and each has one target.

    Raises:
        ConfigError: it names both rules.
    """
    several = [number for number, rule in enumerate(rules) if rule.enabled and rule.target.lists]
    if len(several) > 1:
        first, second = several[:2]
        raise ConfigError(
            f"rules[{second}].target: rules[{first}] has a list already. Allowed: one rule with a list of targets"
        )


def check_epochs(config: Any, epochs: int, prune_at: str) -> None:
    """Refuse a family whose members do not all fit into a training, the fine-tuning of the last one included.

    Args:
        config: a pruning config.
        epochs: of the training.
        prune_at: "begin" or "end": when in an epoch its event takes place.

    Raises:
        ConfigError: it names the rule, and the epochs that are needed.
    """
    for number, rule in enumerate(config.rules):
        if rule.enabled and rule.target.lists and rule.unit == "epoch":
            due, hold = rule.span.bounds()[-1][1], rule.hold or 0
            needed = math.ceil(due + hold + (prune_at == "end") - ROUNDING)
            if needed > epochs:
                raise ConfigError(
                    f"epochs: {epochs} are too few for pruning.rules[{number}]: its last member is due in epoch "
                    f"{due:g}, and hold is {hold}. Allowed: {needed} or more"
                )
