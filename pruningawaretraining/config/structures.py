"""Several structures in one rule: ``pattern: [channel, head, depth]``, ranked together by the loss that they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pruningawaretraining.errors import ConfigError, unknown
from pruningawaretraining.registry import build, canonical, lookup, names

STRUCTURES = ("channel", "head", "depth")
WHY_ALONE = {
    "expert": "a token takes as many experts whatever their number, so that they save parameters and no MACs, and "
    "channels of stacked experts are not found; give experts a rule of their own"
}


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
    if "channel" in found:
        return {"type": "channel", "heads": "head" in found, "depth": "depth" in found}
    return {"type": "head", "depth": True}


def _not_ranked(key: str, name: Any) -> str:
    """The message for an entry that cannot be ranked with the structures; a known pattern gets its own reason."""
    if not isinstance(name, str) or name not in names("pattern"):
        return unknown(key, str(name), STRUCTURES)
    reason = WHY_ALONE.get(name, "it prunes inside layers, and what that saves does not compare")
    return f"{key}: {name!r} is not ranked with other structures: {reason}. Allowed: {', '.join(STRUCTURES)}"


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
    listed = isinstance(pattern, (list, tuple))
    blocks = "depth" in [canonical("pattern", one, "pattern") for one in pattern] if listed else with_blocks(pattern)
    return {"channel", "block"} if blocks else {"channel"}


def _scored(criterion: Any) -> set[str]:
    """The kinds of groups that a criterion, or its class, scores."""
    return set(getattr(getattr(criterion, "needs", None), "kinds", ()))


def _fits(criterion: Any, kinds: set[str]) -> bool:
    """Whether a criterion's class can be named alone for these kinds of groups."""
    adds_up = getattr(criterion, "reduction", "sum") == "sum"
    return in_loss_units(criterion) and kinds <= _scored(criterion) and adds_up


def with_blocks(pattern: Any) -> bool:
    """Whether a pattern of a config has residual blocks beside channels or heads."""
    return isinstance(pattern, Mapping) and bool(pattern.get("depth"))


def check_structures(rule: Any) -> None:
    """Refuse options that mean nothing where whole blocks compete with what is in them.

    Args:
        rule: of a config.

    Raises:
        ConfigError: it names the option.
    """
    if not with_blocks(rule.pattern) or not rule.enabled:
        return
    check_comparable(rule.criterion, rule.pattern)
    if rule.target.sparsity is not None or rule.sparsity_per_layer or rule.keep_per_layer:
        key = "target.sparsity" if rule.target.sparsity is not None else "sparsity_per_layer, keep_per_layer"
        raise ConfigError(
            f"{key}: a count of groups means nothing where blocks, heads and channels compete. Allowed: target.macs, "
            "target.parameters, target.latency"
        )
    if rule.dynamic != "frozen":
        raise ConfigError(
            f"dynamic: {rule.dynamic!r} would restore channels in removed blocks. Allowed with blocks: frozen"
        )
    if rule.scope != "global":
        raise ConfigError(
            f"scope: {rule.scope!r} has no effect where blocks, heads and channels compete for one budget. "
            "Allowed: global"
        )
    if rule.allocation in ("ranking", "uniform"):
        raise ConfigError(
            f"allocation: {rule.allocation!r} does not weigh what a structure saves. Allowed: macs, parameters, latency"
        )
