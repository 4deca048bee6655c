"""Which rules may act on one layer: channels and one finer pattern, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pruningawaretraining.errors import ConfigError


@dataclass(frozen=True)
class Claim:
    """The layers that one rule prunes.

    Args:
        key: of the rule.
        pattern: name of its pattern.
        layers: those that it prunes.
        nested: whether it may prune inside layers that an earlier rule prunes.
        lives: whether its masked weights keep their dense values, so that no other mask goes with them.
    """

    key: str
    pattern: str
    layers: Sequence[str]
    nested: bool = False
    lives: bool = False


def check_stacking(claims: Iterable[Claim]) -> None:
    """Refuse two rules on one layer unless one prunes channels and the other what is inside them, or the later one is
    nested.

    Args:
        claims: of the rules that are enabled, in order.

    Raises:
        ConfigError: two rules that do not stack; names both and the layer.
    """
    owners: dict[tuple[str, bool], Claim] = {}
    for one in claims:
        for layer in one.layers:
            other = owners.setdefault((layer, one.pattern == "channel"), one)
            if other is not one and (not one.nested or other.lives):
                raise ConfigError(
                    f"{one.key}.layers: {layer!r} is pruned by {other.key} ({other.pattern}) already, and "
                    f"{one.pattern} does not go with it. Allowed on one layer: one rule for channels and one for "
                    "slices, blocks, N:M or single weights; further ones of these with nested: true"
                )
