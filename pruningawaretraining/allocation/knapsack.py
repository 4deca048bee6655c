"""Allocation by widths: least importance lost per unit of cost saved, along the staircase of the hardware.

Shape suffixes: ``_G`` groups of one rule, ``_S`` sets of the model, ``_N`` candidates, ``_K`` widths of one set.

A knapsack by steps: from what is kept now, the set and the width that save most for the importance they lose, until
every goal holds; then whatever fits is given back, the most important first. Steps go over several widths at once, so a
width between two stairs, which saves nothing, is passed over.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pruningawaretraining.allocation.goals import Goal
from pruningawaretraining.allocation.ranking import Allocator
from pruningawaretraining.costs.widths import SetCost

WIDTHS = 64  # steps of a set are the largest power of 2 that leaves it about so many widths
LEAST = 1e-12
UNITS = (1, 4, 8, 16)
TIGHTER = 0.995  # of a budget, when the masks miss what the widths promised


@dataclass(frozen=True)
class Searched:
    """The task of a search for the widths of one rule.

    Args:
        allocator: of the rule: the order of groups within sets, limits, and what is gone already.
        scores_G: importance of the rule's groups.
        sets: numbers of the rule's sets among the model's.
        groups: the rule's groups among the model's.
        keep_D: what the model keeps now, all groups.
        set_ids_D: set of each of the model's groups.
    """

    allocator: Allocator
    scores_G: Tensor
    sets: Sequence[int]
    groups: Tensor
    keep_D: Tensor
    set_ids_D: Tensor


class WidthSearch:
    """Finds the widths of one rule's sets; those of the others stay.

    Args:
        searched: the rule, and the model's groups.
    """

    def __init__(self, searched: Searched) -> None:
        self.allocator, self.sets = searched.allocator, list(searched.sets)
        self.groups, self.keep_D = searched.groups, searched.keep_D
        allocator, scores_G, set_ids_D = searched.allocator, searched.scores_G, searched.set_ids_D
        count = int(set_ids_D.max()) + 1 if len(set_ids_D) else 0
        kept_S = torch.zeros(count, dtype=torch.float64).index_add_(0, set_ids_D, self.keep_D.double())
        allowed_S = [int((~allocator.forced_G[allocator.set_ids == n]).sum()) for n in range(len(self.sets))]
        self.most = {one: float(allowed) for one, allowed in zip(self.sets, allowed_S, strict=True)}
        for one, allowed in self.most.items():
            kept_S[one] = allowed
        self.start_S = kept_S
        self.widths = {one: self._widths(number) for number, one in enumerate(self.sets)}
        self.worth = {one: self._worth(number, scores_G) for number, one in enumerate(self.sets)}
        self._worths = torch.cat([self.worth[one] for one in self.sets])  # of one set after the other
        starts = itertools.accumulate((len(self.worth[one]) for one in self.sets), initial=0)
        candidates = [
            (one, start, width)
            for one, start in zip(self.sets, starts, strict=False)
            for width in self.widths[one]
            if width <= int(self.most[one])
        ]
        self._set_N, self._start_N, self._width_N = torch.tensor(candidates, dtype=torch.int64).reshape(-1, 3).unbind(1)

    def _widths(self, number: int) -> list[int]:
        """Numbers of groups that a set may keep, ascending: at least its floor, in steps."""
        size, floor = int(self.allocator.sizes_S[number]), int(self.allocator.floor_S[number])
        step = max(1 << max(int(size / WIDTHS).bit_length() - 1, 0), 1)
        multiple = int(self.allocator.step_S[number])
        step = step if step % multiple == 0 else multiple
        most = int(self.most[self.sets[number]])
        steps = {one for one in range(step, most + 1, step) if one >= floor}
        rounded = most if multiple == 1 or most == size else most // multiple * multiple
        return sorted({*steps, min(floor, most), max(rounded, min(floor, most))})

    def _worth(self, number: int, scores_G: Tensor) -> Tensor:
        """Importance of the best k groups of a set, for k = 0, 1, ... (never falling)."""
        inside = self.allocator.set_ids == number
        order = torch.argsort(self.allocator.place_G[inside])
        scores = scores_G.detach().cpu().double()[inside][order]
        finite = scores[torch.isfinite(scores)]
        lowest = float(finite.min().clamp(max=0.0)) if len(finite) else 0.0
        last = float((finite - lowest).sum()) + 1.0  # infinite: after all others
        scores = torch.where(torch.isfinite(scores), scores - lowest, torch.where(scores > 0, last, 0.0))
        return torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumsum(scores, 0)])

    def solve(self, goals: Sequence[Goal], driver: SetCost | None = None) -> Tensor:
        """Keep mask of the rule's groups under which every goal holds.

        Args:
            goals: what must hold.
            driver: whose savings are weighed against importance; without it (and once its own goal holds) that of the
                goal that is furthest off.

        Raises:
            TargetError: the limits make a goal unreachable.
        """
        self.check(goals)
        tight = list(goals)
        for _ in range(12):
            kept_S = self.give_back(self.descend(tight, driver), tight)
            keep_G = self.mask(kept_S)
            missed = [goal.cost(self._whole(keep_G)) > goal.budget for goal in goals]
            if not any(missed):
                return keep_G
            tight = [
                replace(goal, budget=goal.budget * TIGHTER) if miss else goal
                for goal, miss in zip(tight, missed, strict=True)
            ]
        return self.least(goals)

    def least(self, goals: Sequence[Goal]) -> Tensor:
        """Smallest keep mask that the limits allow."""
        return self.allocator.smallest()

    def mask(self, kept_S: Tensor) -> Tensor:
        """Keep mask of the best groups of every set."""
        kept = torch.tensor([float(kept_S[one]) for one in self.sets], dtype=torch.float64)
        return (self.allocator.place_G < kept[self.allocator.set_ids]) & ~self.allocator.forced_G

    def _whole(self, keep_G: Tensor) -> Tensor:
        whole = self.keep_D.clone()
        whole[self.groups] = keep_G
        return whole

    def check(self, goals: Sequence[Goal]) -> None:
        """Refuse unreachable goals; the smallest widths may be odd, and slower than round ones.

        Raises:
            TargetError: the message names the goal, and what is reachable.
        """
        for goal in goals:
            least = min(goal.cost(self._whole(self.mask(self.rounded(unit)))) for unit in UNITS)
            if least > goal.budget:
                raise goal.out_of_reach(least)

    def descend(self, goals: Sequence[Goal], driver: SetCost | None) -> Tensor:
        kept_S = self.start_S.clone()
        savings: dict[int, Tensor] = {}
        active: SetCost | None = None
        with_goal: bool | None = None  # a driver whose own goal holds from the start guides all the way
        while True:
            over = [goal for goal in goals if float(goal.cost.of_sets(kept_S.unsqueeze(0))[0]) > goal.budget]
            if not over:
                return kept_S
            if with_goal is None:
                with_goal = any(goal.cost is driver for goal in over)
            if with_goal and not any(goal.cost is driver for goal in over):
                driver, with_goal = None, False  # its own goal holds: from here on the others decide
            chosen, need = self._driver(over, kept_S, driver)
            if chosen is not active:
                active, savings = chosen, {}
            step = self._best_step(chosen, kept_S, savings, need if len(over) == 1 else None)
            if step is None and driver is not None:
                driver, with_goal = None, False  # nothing saves more of it
                continue
            if step is None:
                return self.smallest(goals)
            self.take(kept_S, *step)
            for one in {step[0], *torch.nonzero(chosen.neighbours()[step[0]]).flatten().tolist()}:
                savings.pop(one, None)

    def take(self, kept_S: Tensor, one: int, width: int) -> None:
        """Narrow a set, in place."""
        kept_S[one] = width

    def lost(self, one: int, kept_S: Tensor, lower: list[int]) -> Tensor:
        """Importance that each of these widths of a set would lose."""
        return self.worth[one][int(kept_S[one])] - self.worth[one][torch.tensor(lower)]

    def smallest(self, goals: Sequence[Goal]) -> Tensor:
        """The smallest widths, rounded up as suits the goals best."""
        rows = [self.rounded(unit) for unit in UNITS]
        over = [max(float(goal.cost.of_sets(row.unsqueeze(0))[0]) / goal.budget for goal in goals) for row in rows]
        return rows[over.index(min(over))]

    def rounded(self, unit: int) -> Tensor:
        """Each set's smallest width, rounded up to a multiple of a unit."""
        kept_S = self.start_S.clone()
        for one in self.sets:
            kept_S[one] = min(float(-(-self.widths[one][0] // unit) * unit), self.most[one])
        return kept_S

    def _driver(self, over: Sequence[Goal], kept_S: Tensor, driver: SetCost | None) -> tuple[SetCost, float | None]:
        """The cost to save next, and how much of it is needed if it has a goal itself."""
        row = kept_S.unsqueeze(0)
        worst = max(over, key=lambda goal: float(goal.cost.of_sets(row)[0]) / goal.budget)
        mine = worst if driver is None else next((goal for goal in over if goal.cost is driver), None)
        if mine is None:
            assert driver is not None
            return driver, None
        return mine.cost, float(mine.cost.of_sets(row)[0]) - mine.budget

    def _best_step(
        self, cost: SetCost, kept_S: Tensor, savings: dict[int, Tensor], need: float | None
    ) -> tuple[int, int] | None:
        """The set and width with the best saving per importance lost; if one step is enough, the least loss."""
        missing = [one for one in self.sets if one not in savings]
        self._fill(cost, kept_S, savings, missing)
        best: tuple[float, int, int] | None = None
        enough: tuple[float, int, int] | None = None
        for one in self.sets:
            lower = self.lower(one, kept_S)
            if not lower:
                continue
            saved_K = savings[one]
            lost_K = self.lost(one, kept_S, lower)
            ratio_K = torch.where(saved_K > LEAST, saved_K / lost_K.clamp(min=LEAST), -1.0)
            index = int(ratio_K.argmax())
            if float(ratio_K[index]) > 0 and (best is None or float(ratio_K[index]) > best[0]):
                best = (float(ratio_K[index]), one, lower[index])
            if need is not None and bool((saved_K >= need).any()):
                losses = torch.where(saved_K >= need, lost_K, torch.inf)
                index = int(losses.argmin())
                if enough is None or float(losses[index]) < enough[0]:
                    enough = (float(losses[index]), one, lower[index])
        if best is None:
            return None
        if enough is not None and self._suffices(best, savings, kept_S, need):
            return enough[1], enough[2]
        return best[1], best[2]

    def _suffices(
        self, step: tuple[float, int, int], savings: dict[int, Tensor], kept_S: Tensor, need: float | None
    ) -> bool:
        lower = self.lower(step[1], kept_S)
        return need is not None and float(savings[step[1]][lower.index(step[2])]) >= need

    def lower(self, one: int, kept_S: Tensor) -> list[int]:
        """Widths that a set may still be narrowed to."""
        return self.widths[one][: bisect.bisect_left(self.widths[one], int(kept_S[one]))]

    def _fill(self, cost: SetCost, kept_S: Tensor, savings: dict[int, Tensor], missing: Sequence[int]) -> None:
        """Savings of every lower width of these sets, with the others unchanged."""
        rows, counts = [], []
        for one in missing:
            lower = self.lower(one, kept_S)
            changed = kept_S.repeat(len(lower), 1)
            changed[:, one] = torch.tensor(lower, dtype=torch.float64)
            rows.append(changed)
            counts.append(len(lower))
        if not missing:
            return
        now = float(cost.of_sets(kept_S.unsqueeze(0))[0])
        saved = now - cost.of_sets(torch.cat(rows)) if sum(counts) else torch.zeros(0, dtype=torch.float64)
        for one, part in zip(missing, torch.split(saved, counts), strict=True):
            savings[one] = part

    def give_back(self, kept_S: Tensor, goals: Sequence[Goal]) -> Tensor:
        """Widen sets, the most important groups first, as long as every goal holds."""
        while goals:
            rows, gains = self.wider(kept_S)
            if not len(rows):
                break
            fits = torch.ones(len(rows), dtype=torch.bool)
            for goal in goals:
                fits &= goal.cost.of_sets(rows) <= goal.budget
            gains = torch.where(fits, gains, -1.0)
            index = int(gains.argmax())
            if float(gains[index]) < 0:
                break
            kept_S = rows[index]
        return kept_S

    def wider(self, kept_S: Tensor) -> tuple[Tensor, Tensor]:
        """Every widening of one set: widths of all sets, a row for each, and the importance that each gives back."""
        able_N = self._width_N > kept_S[self._set_N]
        sets_N, starts_N, widths_N = self._set_N[able_N], self._start_N[able_N], self._width_N[able_N]
        rows = kept_S.repeat(len(sets_N), 1)
        rows[torch.arange(len(sets_N)), sets_N] = widths_N.double()
        return rows, self._worths[starts_N + widths_N] - self._worths[starts_N + kept_S[sets_N].long()]
