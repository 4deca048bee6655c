"""Which rules may act on one layer: channels and one finer pattern, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pruningawaretraining.errors import ConfigError


def check_stacking(claims: Iterable[tuple[str, str, Sequence[str]]]) -> None:
    """Refuse two rules on one layer unless one prunes channels and the other what is inside them.

    Args:
        claims: (key of the rule, name of its pattern, its layers) of the rules that are enabled, in order.

    Raises:
        ConfigError: two rules that do not stack; names both and the layer.
    """
    owners: dict[tuple[str, bool], tuple[str, str]] = {}
    for key, pattern, layers in claims:
        for layer in layers:
            place = (layer, pattern == "channel")
            if place in owners:
                other, theirs = owners[place]
                raise ConfigError(
                    f"{key}.layers: {layer!r} is pruned by {other} ({theirs}) already, and {pattern} does not go with "
                    "it. Allowed on one layer: one rule for channels and one for slices, blocks, N:M or single weights"
                )
            owners[place] = key, pattern
