"""Words for the units of a run: channels that are removed, or weights that are set to zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pruningawaretraining.config.structures import listed
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.registry import canonical, spelled

REMOVED = {"channel": "channels", "head": "attention heads", "expert": "experts", "depth": "residual blocks"}
ZEROED = {
    "slice": "slices of weights",
    "block": "blocks of weights",
    "n_of_m": "single weights",
    "unstructured": "single weights",
}
NOUNS = {**REMOVED, **ZEROED}


@dataclass(frozen=True)
class Units:
    """Units that the rules of a run prune.

    Attributes:
        patterns: of its rules, by their registered names.
        regularized: whether a rule has a regulariser.
    """

    patterns: tuple[str, ...] = ("channel",)
    regularized: bool = True

    @property
    def removed(self) -> bool:
        """Whether any of it is removed physically."""
        return any(one not in ZEROED for one in self.patterns)

    @property
    def zeroed(self) -> bool:
        """Whether any of it stays in the model, as zeros."""
        return any(one in ZEROED for one in self.patterns)

    @property
    def nouns(self) -> str:
        """Such as "channels and single weights"."""
        found = list(dict.fromkeys(NOUNS.get(one, one) for one in self.patterns))
        return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)

    @property
    def heading(self) -> str:
        """Over what is kept."""
        return self.nouns.capitalize()

    @property
    def state(self) -> str:
        """Participle for pruned units."""
        return " or ".join(word for word, holds in (("gone", self.removed), ("zero", self.zeroed)) if holds)

    @property
    def label(self) -> str:
        """Of the sparsity through the epochs."""
        return f"groups {' or '.join(self._verbs)}"

    @property
    def _verbs(self) -> list[str]:
        return [word for word, holds in (("removed", self.removed), ("set to zero", self.zeroed)) if holds]

    @property
    def note(self) -> str:
        """Under the heading."""
        coupled = "Layers that are coupled, by a residual sum for example, lose the same channels."
        stays = "The zeros stay in the weights: widths and MACs are those of the dense model."
        return coupled if not self.zeroed else "" if self.removed else stays

    @property
    def rows(self) -> str:
        """Over the list of sets."""
        sets, weights = "Sets of coupled layers: the first by name, the others behind it.", "What each weight kept."
        return " ".join(text for text, holds in ((sets, self.removed), (weights, self.zeroed)) if holds)

    def meaning(self, phase: str) -> str:
        """Description of a phase; "" for an unknown one."""
        masked = " or ".join(
            word for word, holds in (("is removed", self.removed), ("stays zero", self.zeroed)) if holds
        )
        pulls = "the regulariser pulls weak groups towards zero"
        meanings = {
            "regularize": pulls if self.regularized else "no regulariser: nothing is pruned yet",
            "prune": "groups are masked on the schedule",
            "finetune": f"what was masked {masked}; the rest trains on",
            "done": "training is over",
        }
        return meanings.get(phase, "")


def units_of(summary: Mapping[str, Any]) -> Units:
    """Units pruned by the config in a run's summary; channels without rules."""
    config = summary.get("config")
    pruning = config.get("pruning") if isinstance(config, Mapping) else None
    rules = pruning.get("rules") if isinstance(pruning, Mapping) else None
    enabled = [rule for rule in rules or [] if isinstance(rule, Mapping) and rule.get("enabled", True)]
    if not enabled:
        return Units()
    patterns = dict.fromkeys(one for rule in enabled for one in _patterns(rule.get("pattern") or "channel"))
    return Units(tuple(patterns), any(rule.get("regularizer") for rule in enabled))


def _patterns(given: Any) -> list[str]:
    """The registered names of what a rule's pattern ranks."""
    try:
        many = listed(given)
    except ConfigError:  # of another version
        many = given
    if isinstance(many, (list, tuple)):
        return [str(one) for one in many]
    whole = given if isinstance(given, Mapping) else spelled("pattern", str(given)) or {"type": given}
    name = str(whole.get("type"))
    try:
        return [canonical("pattern", name)]
    except ConfigError:  # of another version
        return [name]
