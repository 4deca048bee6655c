"""The effect of a regulariser before pruning began, against the dense baseline of the same run.

Energy is the sum of squares. Histograms are over bins of 1/16 decade, whose middles stand for the norms in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pruningawaretraining.analysis.gap_threshold import before_pruning
from pruningawaretraining.report.run import Run

Moment = Mapping[str, Any]


@dataclass(frozen=True)
class Effect:
    """The energy of the lowest groups, in the regularised model and in the dense one.

    Attributes:
        groups: how many of the lowest are looked at: as many of each set as the run removed.
        of: how many groups there are.
        energy: (epoch, their part of the energy of all groups) until pruning began.
        control: the same of the dense baseline; empty without one.
    """

    groups: int
    of: int
    energy: Sequence[tuple[int, float]]
    control: Sequence[tuple[int, float]]

    @property
    def relative(self) -> list[tuple[float, float]]:
        """(epoch, energy as a part of the dense baseline's), where both are known."""
        dense = dict(self.control)
        return [(float(epoch), share / dense[epoch]) for epoch, share in self.energy if dense.get(epoch)]


def effect(run: Run) -> Effect | None:
    """The effect of the regulariser on the groups that a run removed; None if it removed none or recorded no norms."""
    edges, epochs = run.norms.get("edges") or [], run.norms.get("epochs") or []
    moments = before_pruning(epochs)
    if len(edges) < 2 or not moments:
        return None
    last = epochs[-1]["sets"]
    lost = {name: one["size"] - _alive(last[name]) for name, one in moments[0]["sets"].items() if name in last}
    if not sum(lost.values()):
        return None
    end = int(moments[-1]["epoch"])
    beside = [moment for moment in run.norms.get("dense") or [] if int(moment["epoch"]) <= end]
    control = [] if any(not lost.keys() <= moment["sets"].keys() for moment in beside) else beside
    whole = sum(one["size"] for one in moments[0]["sets"].values())
    return Effect(sum(lost.values()), whole, _shares(edges, moments, lost), _shares(edges, control, lost))


def effect_text(found: Effect | None) -> str:
    """The effect in a sentence; "" where nothing is known."""
    if found is None:
        return ""
    epoch, share = found.energy[-1]
    text = (
        f"After epoch {epoch} the {found.groups} lowest of {found.of} groups, as many as were removed, held "
        f"{100 * share:.1f}% of the sum of squares"
    )
    against = dict(found.control).get(epoch)
    if against is None:
        return f"{text}; there is no dense model to compare with."
    return f"{text}, {100 * against:.1f}% in the dense model of that epoch."


def _alive(one: Mapping[str, Any]) -> int:
    return int(one["size"]) - int(one.get("zeros", 0))


def _shares(edges: Sequence[float], moments: Sequence[Moment], lost: Mapping[str, int]) -> list[tuple[int, float]]:
    return [(int(moment["epoch"]), _share(edges, moment["sets"], lost)) for moment in moments]


def _share(edges: Sequence[float], sets: Mapping[str, Mapping[str, Any]], lost: Mapping[str, int]) -> float:
    """The part of the energy that each set's lowest groups hold, all sets taken together."""
    squares = [left * right for left, right in zip(edges, edges[1:], strict=False)]
    low = whole = 0.0
    for name, count in lost.items():
        left = count - sets[name].get("zeros", 0)
        for number, square in zip(sets[name]["counts"], squares, strict=True):
            taken = min(max(left, 0), number)
            low, whole, left = low + taken * square, whole + number * square, left - taken
    return low / whole if whole else 0.0
