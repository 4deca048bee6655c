"""Options of a rule that only some patterns support: declared by the pattern, refused here for all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pruningawaretraining.config.structures import listed
from pruningawaretraining.config.targets import COSTS, Target
from pruningawaretraining.errors import ConfigError, check_declared, nearest
from pruningawaretraining.registry import build, checked_by, lookup, name_of, names, spelled

IN_PLACE = frozenset({"mode", "keep_zeros", "release", "progressive", "nested"})
REMOVED = frozenset(
    {"application", "final_sparsity", "max_sparsity_from", "target.macs", "target.parameters", "target.costs"}
)
BY_WIDTH = REMOVED | {
    "allocation", "compensation", "multiple", "widths", "target.latency", "target.latency_ms", "target.peak_memory"
}  # fmt: skip
NEUTRAL = {"allocation": (None, "ranking")}
"""Values that any pattern may have, where these are more than the default."""

FROZEN = "frozen"
FINAL = {"progressive": 1, "mode": "prune", "keep_zeros": False, "application": "mask", "nested": False}
"""Options that need masks which are final unless they have this value."""


@dataclass(frozen=True)
class Support:
    """Declares what a pattern supports; a pattern has it as its class attribute ``support``.

    Args:
        kind: what criteria know its groups as: "channel", "expert", "block" (of layers), "weight", or "tile": those
            inside layers that second-order criteria can solve for, of the size that the pattern's ``tile`` says.
        removable: whether its groups can be removed physically.
        options: options of a rule beyond those that every pattern has; "target.macs" and the like for targets.
        penalties: where a regulariser may act: on "gradients", in the "loss", or on "weights" after a step.
        spares_pruned: whether groups in channels that are zero already are left out of every count.
    """

    kind: str = "weight"
    removable: bool = False
    options: frozenset[str] = IN_PLACE
    penalties: frozenset[str] = frozenset({"loss", "weights"})
    spares_pruned: bool = False


WEIGHTS = Support()
TILES = Support("tile")
COUPLED = Support("channel", True, BY_WIDTH, frozenset({"gradients"}))
TOGETHER = Support(
    "channel",
    True,
    frozenset({"application", "allocation", "max_sparsity_from", "multiple", "widths"})
    | {f"target.{name}" for name in ("macs", "parameters", "peak_memory", "costs", "latency", "latency_ms")},
    frozenset({"gradients"}),
)
"""Blocks or experts beside channels and heads."""
BLOCKS = Support("block", True, REMOVED - {"max_sparsity_from"}, frozenset({"gradients"}))
EXPERTS = Support(
    "expert",
    True,
    (REMOVED - {"target.macs", "target.costs"}) | {"multiple", "widths"},
    frozenset({"gradients"}),
)
"""As many experts a token are computed whatever their number, so that MACs say nothing of them."""
OPTIONS = tuple(sorted(one for one in IN_PLACE | BY_WIDTH if not one.startswith("target.")))


METHODS = {"prepare": "gradients", "penalty": "loss", "after_step": "weights"}
"""Method of a regulariser -> where it acts."""


class RuleOptions(Protocol):
    """The fields of a rule that are looked at."""

    @property
    def pattern(self) -> str | Mapping[str, Any]: ...

    @property
    def regularizer(self) -> str | Mapping[str, Any] | None: ...

    @property
    def dynamic(self) -> str | Mapping[str, Any]: ...

    @property
    def target(self) -> Target: ...


def support_of(pattern: Any) -> Support:
    """Support declared by a pattern or its class; by default that of patterns inside layers."""
    found: Any = getattr(pattern, "support", WEIGHTS)
    check_declared(isinstance(found, Support), "pattern", name_of("pattern", pattern), "support", found, "a Support")
    declared: Support = found
    together = any(getattr(pattern, name, False) for name in ("depth", "experts"))
    return replace(TOGETHER, kind=declared.kind) if together else declared


@checked_by("pattern")
def check_pattern(name: str, entry: Any) -> None:
    """Refuse a pattern whose ``support`` is not a Support, or that has no method to find its groups.

    Raises:
        ConfigError: it names the pattern.
    """
    found = getattr(entry, "support", WEIGHTS)
    check_declared(isinstance(found, Support), "pattern", name, "support", found, "a Support")
    if found.removable:
        if not hasattr(entry, "chosen"):
            raise ConfigError(
                f"pattern {name!r}: it has no method 'chosen'. Allowed: chosen(model, layers, exclude, key)"
            )
    elif found.kind == TILES.kind and not hasattr(entry, "tile"):
        raise ConfigError(f"pattern {name!r}: its support is for tiles, and it has no 'tile'. Allowed: (rows, columns)")
    elif not hasattr(entry, "build"):
        raise ConfigError(
            f"pattern {name!r}: it has no method 'build', and no support that says its groups can be removed. "
            "Allowed: support = COUPLED for removable groups, or build(model, layers, exclude)"
        )


def type_of(kind: str, spec: str | Mapping[str, Any]) -> str:
    """The registered name in a config value: "block" of "4x1" or of ``{type: block, rows: 4}``."""
    if isinstance(spec, str):
        spec = spelled(kind, spec) or {"type": spec}
    return str(spec["type"])


def check_supported(rule: RuleOptions, defaults: Mapping[str, Any]) -> None:
    """Refuse options that the rule's pattern does not support.

    Args:
        rule: a rule of a config.
        defaults: option -> the value that it has where it is not given.

    Raises:
        ConfigError: it names the option, its value, and patterns that support it.
    """
    neutral = {option: NEUTRAL.get(option, (defaults[option],)) for option in OPTIONS}
    given = [option for option in OPTIONS if getattr(rule, option) not in neutral[option]]
    if not given and not rule.target.about_costs and rule.regularizer is None and rule.dynamic == FROZEN:
        return
    support = support_of(build("pattern", rule.pattern, "pattern"))
    for option in given:
        if option not in support.options:
            raise ConfigError(_refusal(rule, option, getattr(rule, option), repr(defaults[option])))
    for name in COSTS:
        value = getattr(rule.target, name)
        if value is not None and f"target.{name}" not in support.options:
            allowed = [f"target.{one}" for one in ("sparsity", *COSTS) if f"target.{one}" in support.options]
            raise ConfigError(_refusal(rule, f"target.{name}", value, ", ".join(["target.sparsity", *allowed])))
    if rule.regularizer is not None and acts_of(type_of("regularizer", rule.regularizer)) not in support.penalties:
        fitting = [one for one in names("regularizer") if acts_of(one) in support.penalties]
        raise ConfigError(_refusal(rule, "regularizer", rule.regularizer, ", ".join(fitting)))
    if rule.dynamic != FROZEN:
        _check_dynamic(rule, support.removable)


def acts_of(regularizer: str) -> str:
    """Where a registered regulariser acts: as it declares, or by the method that it has."""
    entry = lookup("regularizer", regularizer)
    check_regularizer(regularizer, entry)
    method = next(one for one in METHODS if hasattr(entry, one))
    return str(getattr(entry, "acts", METHODS[method]))


@checked_by("regularizer")
def check_regularizer(name: str, entry: Any) -> None:
    """Refuse a regulariser that has nothing to act with.

    Raises:
        ConfigError: it declares another place, or lacks the method for it.
    """
    methods = [one for one in METHODS if hasattr(entry, one)]
    if not methods:
        raise ConfigError(f"regularizer {name!r}: it has none of the methods {', '.join(METHODS)}")
    found: Any = getattr(entry, "acts", METHODS[methods[0]])
    if found not in METHODS.values():
        close = nearest(str(found), METHODS.values())
        hint = f"; did you mean {close!r}?" if close else "."
        allowed = ", ".join(METHODS.values())
        raise ConfigError(f"regularizer {name!r}: its acts is {found!r:.80}{hint} Allowed: {allowed}")
    needed = next(one for one, place in METHODS.items() if place == found)
    if needed not in methods:
        raise ConfigError(f"regularizer {name!r}: its acts is {found!r}, and it has no method {needed!r}")


def _goes(dynamic: Any, groups: str) -> bool:
    """Whether a dynamic works for removable groups, or windows; one that does not say it does."""
    return bool(getattr(dynamic, groups, True))


def _check_dynamic(rule: RuleOptions, removable: bool) -> None:
    """Refuse a dynamic on groups that it does not work for, and options that need final masks."""
    entry = lookup("dynamic", type_of("dynamic", rule.dynamic))
    pattern = lookup("pattern", type_of("pattern", rule.pattern))
    if not hasattr(entry, "nested"):
        raise ConfigError(f"dynamic: {rule.dynamic!r} is not a dynamic. Allowed: a subclass of masks.dynamics.Dynamic")
    if not (_goes(entry, "removable") if removable else _goes(entry, "windows") or not hasattr(pattern, "window")):
        fitting = [
            name for name in names("dynamic") if _goes(lookup("dynamic", name), "removable" if removable else "windows")
        ]
        refused = f"dynamic: {rule.dynamic!r} is not supported by the pattern {listed(rule.pattern)!r}"
        raise ConfigError(f"{refused}. Allowed: {', '.join(fitting)}")
    for option, final in FINAL.items():
        if (not entry.nested or entry.rewinds) and getattr(rule, option) != final:
            raise ConfigError(
                f"{option}: {getattr(rule, option)!r} needs masks that are final, and dynamic is {rule.dynamic!r}. "
                f"Allowed: {final!r}, or dynamic: frozen"
            )


def _refusal(rule: RuleOptions, option: str, value: Any, allowed: str) -> str:
    others = [one for one in names("pattern") if option in support_of(lookup("pattern", one)).options]
    with_others = f"; or a pattern that supports it: {', '.join(others)}" if others else ""
    refused = f"{option}: {value!r} is not supported by the pattern {listed(rule.pattern)!r}"
    return f"{refused}. Allowed: {allowed}{with_others}"
