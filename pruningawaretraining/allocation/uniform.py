"""Equal widths: layers of a kind keep equally many groups.

Shape suffixes: ``_R`` groups of one rule, ``_D`` groups of the dense model.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from pruningawaretraining.allocation.policies import Task, goals_of
from pruningawaretraining.groups.grouping import Grouping, GroupSet
from pruningawaretraining.patterns.structures import is_block


def kind_of(one: GroupSet) -> tuple[str, int, int]:
    """Sets are of one kind if they have one size in the model's config, or their names differ in numbers alone; and if
    they have equally many groups of equal width."""
    return one.kind or re.sub(r"\d+", "#", one.name), one.size, one.width


def kinds_of(grouping: Grouping, keep_R: Tensor) -> list[list[int]]:
    """Numbers of the sets of each kind; without residual blocks, and what is left of none because its block is out."""
    kinds: dict[tuple[str, int, int], list[int]] = {}
    for number, one in enumerate(grouping.sets):
        if not is_block(one) and bool(keep_R[one.start : one.stop].any()):
            kinds.setdefault(kind_of(one), []).append(number)
    return list(kinds.values())


def uniform(grouping: Grouping, keep_R: Tensor, scores_R: Tensor) -> Tensor:
    """Masks in which all sets of a kind keep as many groups as the one of them that keeps fewest, the best ones.

    Args:
        grouping: the rule's groups.
        keep_R: the masks that an allocation gave; only kept groups may go.
        scores_R: importance.
    """
    keep_R = keep_R.clone()
    for kind in kinds_of(grouping, keep_R):
        sets = [grouping.sets[number] for number in kind]
        least = min(int(keep_R[one.start : one.stop].sum()) for one in sets)
        for one in sets:
            mine = keep_R[one.start : one.stop]  # a view
            kept = torch.nonzero(mine).flatten()
            order = torch.argsort(scores_R[one.start : one.stop][kept], stable=True)
            mine[kept[order[: len(kept) - least]]] = False
    return keep_R


def evened(allocate: Callable[[Task], Tensor]) -> Callable[[Task], Tensor]:
    """An allocation with equal widths: made even by taking away, then given back as long as every goal holds."""

    def evenly(task: Task) -> Tensor:
        return _given_back(task, uniform(task.share.grouping, allocate(task), task.scores_R))

    return evenly


def _given_back(task: Task, keep_R: Tensor) -> Tensor:
    """Widen all sets of a kind together, the most important groups first."""
    grouping, goals, whole_D = task.share.grouping, goals_of(task), task.keep_D.clone()
    steps, kinds = task.allocator().step_S.tolist(), kinds_of(grouping, keep_R)

    def fits(wider_R: Tensor) -> bool:
        whole_D[task.share.groups_D] = wider_R
        return all(goal.cost(whole_D) <= goal.budget for goal in goals)

    while True:
        able_R = task.keep_D[task.share.groups_D] & ~keep_R
        found = [_next(grouping, kind, steps, able_R, task.scores_R) for kind in kinds]
        options = [(float(task.scores_R[more].sum()), more) for more in found if more is not None]
        for _, more in sorted(options, key=lambda one: -one[0]):
            wider_R = keep_R.index_fill(0, more, True)
            if fits(wider_R):
                keep_R = wider_R
                break
        else:
            return keep_R


def _next(grouping: Grouping, kind: list[int], steps: list[int], able_R: Tensor, scores_R: Tensor) -> Tensor | None:
    """The best groups that would make every set of a kind one step wider; None where a set has too few left."""
    more = []
    for number in kind:
        one = grouping.sets[number]
        able = torch.nonzero(able_R[one.start : one.stop]).flatten()
        if len(able) < steps[number]:
            return None
        order = torch.argsort(scores_R[one.start : one.stop][able], descending=True, stable=True)
        more.append(able[order[: steps[number]]] + one.start)
    return torch.cat(more)
