"""Equal widths: layers of a kind keep as many groups as the one of them that keeps fewest.

Shape suffixes: ``_R`` groups of one rule.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from pruningawaretraining.groups.grouping import Grouping, GroupSet


def kind_of(one: GroupSet) -> tuple[str, int, int]:
    """Sets are of one kind if their names differ in numbers alone, and they have equally many groups of equal width."""
    return re.sub(r"\d+", "#", one.name), one.size, one.width


def uniform(grouping: Grouping, keep_R: Tensor, scores_R: Tensor) -> Tensor:
    """Masks in which all sets of a kind keep equally many groups, those with the highest scores.

    Args:
        grouping: the rule's groups.
        keep_R: the masks that an allocation gave; only kept groups may go.
        scores_R: importance.
    """
    kinds: dict[tuple[str, int, int], list[GroupSet]] = {}
    for one in grouping.sets:
        kinds.setdefault(kind_of(one), []).append(one)
    keep_R = keep_R.clone()
    for sets in kinds.values():
        least = min(int(keep_R[one.start : one.stop].sum()) for one in sets)
        for one in sets:
            mine = keep_R[one.start : one.stop]  # a view
            kept = torch.nonzero(mine).flatten()
            order = torch.argsort(scores_R[one.start : one.stop][kept], stable=True)
            mine[kept[order[: len(kept) - least]]] = False
    return keep_R
