"""Pruning modifiers that follow each other as the phases of one rule: what gradual recipes are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pruningawaretraining.errors import ConfigError

PLACES = "places"
"""Beside the fields of a rule: place in the recipe and layers of each of its phases, for messages."""


@dataclass(frozen=True)
class Piece:
    """One pruning modifier in the native form's terms.

    Args:
        name: its place in the recipe.
        pattern, layers, exclude, criterion, scope, release, keep_zeros: fields of a rule.
        start, end, every: in epochs.
        schedule: from ``initial`` at ``start`` to ``final`` at ``end``.
        initial: a sparsity, or "present": that which is there.
        final: the sparsity at the end.
    """

    name: str
    pattern: dict[str, Any]
    layers: list[str] | None
    criterion: dict[str, Any]
    scope: str
    release: bool
    start: float
    end: float
    every: float
    schedule: str
    initial: float | str
    final: float
    keep_zeros: bool = False
    exclude: list[str] = field(default_factory=list)

    @property
    def at_once(self) -> bool:
        """Whether it prunes at its start, and never again."""
        return self.initial == self.final or self.start == self.end

    def follows(self, other: Piece) -> bool:
        """Whether it may go on where another one ends: later, and in the same way."""
        same = ("pattern", "exclude", "criterion", "scope")
        alike = all(getattr(self, name) == getattr(other, name) for name in same)
        later = self.start > other.start if other.at_once else self.start >= other.end
        return alike and later and not other.release

    def schedule_of(self) -> dict[str, Any]:
        """Fields of a rule or phase: when, and from which sparsity."""
        if self.at_once:
            return {"start": self.start, "end": self.start, "every": 1, "schedule": "one_shot", "initial": None}
        keys = {"start": self.start, "end": self.end, "every": self.every, "schedule": self.schedule}
        return {**keys, "initial": self.initial}


def rules_of(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """A rule for each chain of pieces that follow each other; the others are rules by themselves."""
    chains: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda one: one.start):
        chain = next((one for one in chains if piece.follows(one[-1])), None)
        if chain is None:
            chains.append([piece])
        elif not _holds(piece, chain[-1]):
            chain.append(piece)
    order = {piece.name: number for number, piece in enumerate(pieces)}
    return [_rule(chain) for chain in sorted(chains, key=lambda one: order[one[0].name])]


def nested(rules: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rules of which each may prune layers that those before it prune, where it may name the same.

    Raises:
        ConfigError: two rules whose masks change name the same layers.
    """
    found: list[dict[str, Any]] = []
    for rule in rules:
        changing = [one for one in found if "dynamic" in one and _surely_shared(one["layers"], rule["layers"])]
        if changing and "dynamic" in rule:
            raise ConfigError(
                f"{rule['name']}.params: {changing[0]['name']} prunes the same, and the masks of both change. Allowed: "
                "one of them on a layer"
            )
        shared = "dynamic" not in rule and any(_may_share(one["layers"], rule["layers"]) for one in found)
        found.append({**rule, "nested": True} if shared else rule)
    return found


def _may_share(one: list[str] | None, other: list[str] | None) -> bool:
    """Whether two lists of entries may choose the same layer."""
    exact = one is not None and other is not None and not any(":" in entry for entry in [*one, *other])
    return not exact or _surely_shared(one, other)


def _surely_shared(one: list[str] | None, other: list[str] | None) -> bool:
    return one is None or other is None or not set(one).isdisjoint(other)


def _holds(piece: Piece, before: Piece) -> bool:
    """Whether a piece adds nothing: it asks for what the one before has reached."""
    return piece.at_once and piece.layers == before.layers and piece.final <= before.final and not piece.release


def _rule(chain: Sequence[Piece]) -> dict[str, Any]:
    first, last = chain[0], chain[-1]
    alike = all(piece.layers == first.layers for piece in chain)
    entries = [entry for piece in chain for entry in piece.layers or ()]
    whole = any(piece.layers is None for piece in chain)
    rule: dict[str, Any] = {
        "name": first.name,
        "pattern": first.pattern["type"] if len(first.pattern) == 1 else first.pattern,
        "layers": None if whole else list(dict.fromkeys(entries)),
        "exclude": first.exclude,
        "criterion": first.criterion,
        "scope": first.scope,
        "target": {"sparsity": last.final},
        "release": last.release,
        "keep_zeros": first.keep_zeros or first.initial == "present",
    }
    if len(chain) > 1:
        places = [(piece.name, piece.layers or []) for piece in chain]
        return {**rule, "phases": [_phase(piece, alike) for piece in chain], PLACES: places}
    return {**rule, **first.schedule_of(), "at_init": first.at_once and first.start == 0}  # once, before any training


def _phase(piece: Piece, alike: bool) -> dict[str, Any]:
    layers = None if alike or piece.layers is None else piece.layers
    return {**piece.schedule_of(), "sparsity": piece.final, "layers": layers}


def without_places(rule: dict[str, Any]) -> dict[str, Any]:
    """The fields of a rule alone."""
    return {key: value for key, value in rule.items() if key != PLACES}
