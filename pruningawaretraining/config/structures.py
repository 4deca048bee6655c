"""Several structures in one rule: ``pattern: [channel, head, depth]``, ranked together by the loss that they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pruningawaretraining.errors import ConfigError, unknown
from pruningawaretraining.registry import build, canonical, lookup, names

STRUCTURES = ("channel", "head", "depth")


def one_pattern(structures: Sequence[Any]) -> str | dict[str, Any]:
    """The pattern that a list of structures stands for.

    Raises:
        ConfigError: an entry that is not a structure, or is there twice; or none.
    """
    found: list[str] = []
    for number, one in enumerate(structures):
        name = canonical("pattern", one, f"pattern[{number}]") if isinstance(one, str) else one
        if not isinstance(name, str) or name not in STRUCTURES:
            raise ConfigError(unknown(f"pattern[{number}]", str(one), STRUCTURES))
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


def check_comparable(criterion: str | Mapping[str, Any], pattern: Any) -> None:
    """Refuse a criterion whose scores of channels, heads and blocks cannot be compared.

    Args:
        criterion: as the config has it.
        pattern: likewise.

    Raises:
        ConfigError: it names criteria that can.
    """
    made = build("criterion", criterion, "criterion")
    fitting = [name for name in names("criterion") if in_loss_units(lookup("criterion", name))]
    if not in_loss_units(made):
        raise ConfigError(
            f"criterion: {criterion!r} is not a change of the loss, so that scores of the structures of {pattern!r} do "
            f"not compare: their weights differ in number and size. Allowed: {', '.join(fitting)}"
        )
    if getattr(made, "reduction", "sum") != "sum":
        raise ConfigError(
            f"criterion.reduction: {made.reduction!r} does not add up over the structures of {pattern!r}. Allowed: sum"
        )


def in_loss_units(criterion: Any) -> bool:
    """Whether a criterion, or its class, declares that its scores are changes of the loss."""
    return bool(getattr(getattr(criterion, "needs", None), "loss", False))


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
    if rule.allocation in ("ranking", "uniform"):
        raise ConfigError(
            f"allocation: {rule.allocation!r} does not weigh what a structure saves. Allowed: macs, parameters, latency"
        )
