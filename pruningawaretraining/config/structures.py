"""Several structures in one rule: ``pattern: [channel, head, expert, depth]``, ranked by the loss that they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pruningawaretraining.errors import ConfigError, unknown
from pruningawaretraining.registry import build, canonical, lookup, names

STRUCTURES = ("channel", "head", "expert", "depth")
ADDED = {"heads": "head", "experts": "expert", "depth": "depth"}
"""Option of a pattern -> the structure that it adds."""
KINDS = {"channel": "channel", "head": "channel", "expert": "expert", "depth": "block"}
"""Structure -> what criteria know its groups as."""
UNWEIGHED = ("latency", "latency_ms", "peak_memory")
"""Targets that experts do not change in a way that can be predicted."""
AS_MANY = "cannot be weighed against experts: a token takes as many whatever their number"
"""Why these are refused with experts, after the value of a key."""


def one_pattern(structures: Sequence[Any]) -> str | dict[str, Any]:
    """The pattern that a list of structures stands for.

    Raises:
        ConfigError: an entry that is not a structure, or is there twice; or none.
    """
    found: list[str] = []
    for number, one in enumerate(structures):
        name = canonical("pattern", one, f"pattern[{number}]") if isinstance(one, str) else one
        if not isinstance(name, str) or name not in STRUCTURES:
            raise ConfigError(_not_ranked(f"pattern[{number}]", name))
        if name in found:
            raise ConfigError(f"pattern[{number}]: {one!r} is listed twice. Allowed: each structure once")
        found.append(name)
    if not found:
        raise ConfigError(f"pattern: [] names no structure. Allowed: {', '.join(STRUCTURES)}")
    if len(found) == 1:
        return found[0]
    own = next(one for one in STRUCTURES if one in found)
    always = ADDED.keys() - {"experts"} if own == "channel" else ()
    options = {key: one in found for key, one in ADDED.items() if key in always or one in found and one != own}
    return {"type": own, **options}


def _not_ranked(key: str, name: Any) -> str:
    """The message for an entry that cannot be ranked with the structures; a known pattern gets its own reason."""
    if not isinstance(name, str) or name not in names("pattern"):
        return unknown(key, str(name), STRUCTURES)
    reason = "it prunes inside layers, and what that saves does not compare"
    return f"{key}: {name!r} is not ranked with other structures: {reason}. Allowed: {', '.join(STRUCTURES)}"


def structures_of(pattern: Any) -> frozenset[str]:
    """The structures that a list, or a pattern of a config with options, names; none for a name alone."""
    if isinstance(pattern, (list, tuple)):
        return frozenset(canonical("pattern", one, "pattern") for one in pattern)
    if not isinstance(pattern, Mapping):
        return frozenset()
    more = (one for key, one in ADDED.items() if pattern.get(key))
    return frozenset((canonical("pattern", str(pattern.get("type")), "pattern"), *more))


def listed(pattern: Any) -> Any:
    """A pattern of several structures as the list that it stands for; any other as it is."""
    if not isinstance(pattern, Mapping) or not any(pattern.get(key) for key in ADDED):
        return pattern
    structures = structures_of(pattern)
    return [one for one in STRUCTURES if one in structures] if structures <= set(STRUCTURES) else pattern


def has_experts(pattern: Any) -> bool:
    """Whether experts are among the groups of a pattern of a config."""
    return "expert" in structures_of([pattern] if isinstance(pattern, str) else pattern)


def compete(pattern: Any) -> bool:
    """Whether a pattern of a config has residual blocks or experts beside other structures."""
    structures = structures_of(pattern)
    return len(structures) > 1 and not structures.isdisjoint(("expert", "depth"))


def check_comparable(criterion: str | Mapping[str, Any], pattern: Any) -> None:
    """Refuse a criterion whose scores of channels, heads and blocks cannot be compared.

    Args:
        criterion: as the config has it.
        pattern: likewise.

    Raises:
        ConfigError: it names criteria that can.
    """
    made, kinds = build("criterion", criterion, "criterion"), _kinds(pattern)
    fitting = [name for name in names("criterion") if _fits(lookup("criterion", name), kinds)]
    if not in_loss_units(made):
        raise ConfigError(
            f"criterion: {criterion!r} is not a change of the loss, so that scores of the structures of {pattern!r} do "
            f"not compare: their weights differ in number and size. Allowed: {', '.join(fitting)}"
        )
    if not kinds <= _scored(made):
        raise ConfigError(
            f"criterion: {criterion!r} does not score all structures of {pattern!r}. Allowed: {', '.join(fitting)}"
        )
    if getattr(made, "reduction", "sum") != "sum":
        raise ConfigError(
            f"criterion.reduction: {made.reduction!r} does not add up over the structures of {pattern!r}. Allowed: sum"
        )


def in_loss_units(criterion: Any) -> bool:
    """Whether a criterion, or its class, declares that its scores are changes of the loss."""
    return bool(getattr(getattr(criterion, "needs", None), "loss", False))


def _kinds(pattern: Any) -> set[str]:
    """The kinds of groups that are ranked together, as criteria know them."""
    return {KINDS[one] for one in structures_of(pattern) if one in KINDS}


def _scored(criterion: Any) -> set[str]:
    """The kinds of groups that a criterion, or its class, scores."""
    return set(getattr(getattr(criterion, "needs", None), "kinds", ()))


def _fits(criterion: Any, kinds: set[str]) -> bool:
    """Whether a criterion's class can be named alone for these kinds of groups."""
    adds_up = getattr(criterion, "reduction", "sum") == "sum"
    return in_loss_units(criterion) and kinds <= _scored(criterion) and adds_up


def check_structures(rule: Any) -> None:
    """Refuse options that mean nothing where whole blocks or experts compete with other structures.

    Args:
        rule: of a config.

    Raises:
        ConfigError: it names the option.
    """
    if not compete(rule.pattern) or not rule.enabled:
        return
    experts = "expert" in structures_of(rule.pattern)
    check_comparable(rule.criterion, rule.pattern)
    if experts:
        _check_weighed(rule)
    if rule.target.sparsity is not None or rule.sparsity_per_layer or rule.keep_per_layer:
        key = "target.sparsity" if rule.target.sparsity is not None else "sparsity_per_layer, keep_per_layer"
        raise ConfigError(
            f"{key}: a count of groups means nothing where blocks, experts, heads and channels compete. Allowed: "
            f"target.macs, target.parameters{'' if experts else ', target.latency'}"
        )
    if rule.dynamic != "frozen":
        why = "would restore channels in removed blocks. Allowed with blocks: frozen"
        if "depth" not in structures_of(rule.pattern):
            why = "needs gradients of what is masked, and masked experts get no token. Allowed with experts: frozen"
        raise ConfigError(f"dynamic: {rule.dynamic!r} {why}")
    if rule.scope != "global":
        raise ConfigError(
            f"scope: {rule.scope!r} has no effect where blocks, experts, heads and channels compete for one budget. "
            "Allowed: global"
        )
    if rule.allocation in ("ranking", "uniform"):
        raise ConfigError(
            f"allocation: {rule.allocation!r} does not weigh what a structure saves. Allowed: macs, parameters"
            f"{'' if experts else ', latency'}"
        )


def _check_weighed(rule: Any) -> None:
    """Refuse targets that say nothing of experts.

    Raises:
        ConfigError: it names the target.
    """
    found = next((name for name in UNWEIGHED if getattr(rule.target, name) is not None), None)
    if found is not None:
        raise ConfigError(
            f"target.{found}: {getattr(rule.target, found)!r} {AS_MANY}, and what they save is parameters. Allowed "
            "with experts: target.parameters, target.macs, a registered cost"
        )
    if rule.allocation == "latency":
        raise ConfigError(f"allocation: 'latency' {AS_MANY}. Allowed with experts: macs, parameters")
