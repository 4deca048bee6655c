"""Allocation of channels, heads and residual blocks together: widths of sets, and which blocks stay.

Shape suffixes: ``_G`` groups of one rule, ``_S`` sets of the model, ``_D`` groups of the dense model.

A block is a set of one group. Without it the sets inside it cost nothing and are not lost a second time: removing a
block loses its own importance less what its insides have lost already. The descent by steps takes blocks as it takes
widths. Then single blocks are put back or taken out in turn, with the widths of all others found anew, as long as less
is lost. A promised latency comes first: of the choices those that use it up, and of these the one that loses least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pruningawaretraining.allocation.goals import UNUSED, Goal
from pruningawaretraining.allocation.knapsack import LEAST, Searched, WidthSearch
from pruningawaretraining.allocation.ranking import SLACK
from pruningawaretraining.costs.widths import SetCost
from pruningawaretraining.errors import TargetError

EXHAUSTIVE = 4
"""So many blocks are tried in every combination."""
ROUNDS, TRIES = 4, 8
"""With more: rounds of exchanges, and blocks that each tries, those nearest to the other side."""


class StructureSearch(WidthSearch):
    """Finds widths and blocks of one rule.

    Args:
        searched: the rule, and the model's groups.
        blocks: numbers of the sets that are blocks.
        inside: number of a set that lies in a block -> that block's.
        near_G: masks whose blocks are tried first, and taken where they use up what is promised.
    """

    def __init__(
        self, searched: Searched, blocks: Sequence[int], inside: Mapping[int, int], near_G: Tensor | None = None
    ) -> None:
        super().__init__(searched)
        self.near_G = near_G
        allocator, scores_G = searched.allocator, searched.scores_G
        self.blocks = [one for one in blocks if self.most[one] > 0]  # others have gone before
        self.inner = {block: [one for one in self.sets if inside.get(one) == block] for block in self.blocks}
        self.block_of = {one: block for block, inner in self.inner.items() for one in inner}
        self.spared = {one for one in self.blocks if self.widths[one][0] > 0 or math.isinf(self._score(one, scores_G))}
        dense = len(blocks)
        most = math.floor(allocator.limits.max_sparsity * dense + SLACK)
        self.removable = max(0, min(most, dense - 1) - (dense - len(self.blocks)))
        self.fixed: frozenset[int] | None = None  # the blocks that are out, where that is decided

    def _score(self, one: int, scores_G: Tensor) -> float:
        return float(scores_G[self.allocator.set_ids == self.sets.index(one)][0])

    # --- steps --------------------------------------------------------------------------------------------------

    def gone(self, kept_S: Tensor) -> set[int]:
        """The blocks that are out."""
        return {one for one in self.blocks if float(kept_S[one]) == 0}

    def lower(self, one: int, kept_S: Tensor) -> list[int]:
        """See :class:`WidthSearch`; blocks go as far as their number, and a choice that is made, allow."""
        if one in self.inner and (
            self.fixed is not None or one in self.spared or len(self.gone(kept_S)) >= self.removable
        ):
            return []
        return super().lower(one, kept_S)

    def lost(self, one: int, kept_S: Tensor, lower: list[int]) -> Tensor:
        """See :class:`WidthSearch`; a block takes along what has been lost inside it."""
        found = super().lost(one, kept_S, lower)
        return (found - self._inside_lost(one, kept_S)).clamp(min=LEAST) if one in self.inner else found

    def _inside_lost(self, block: int, kept_S: Tensor) -> float:
        return sum(
            float(self.worth[one][int(self.most[one])] - self.worth[one][int(kept_S[one])]) for one in self.inner[block]
        )

    def take(self, kept_S: Tensor, one: int, width: int) -> None:
        """See :class:`WidthSearch`."""
        kept_S[one] = width
        for inner in self.inner.get(one, ()):
            kept_S[inner] = 0.0

    def wider(self, kept_S: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`WidthSearch`; a block comes back whole, or as narrow as it may be."""
        out, before = self.gone(kept_S), self.loss(kept_S)
        closed = sorted(out.union(*(self.inner[block] for block in out)))
        rows, gains = super().wider(kept_S)
        allowed_N = (rows[:, closed] == kept_S[closed]).all(1)
        blocks = () if self.fixed is not None else out
        back = [self._with(kept_S, block, narrow) for block in blocks for narrow in (False, True)]
        gained = torch.tensor([before - self.loss(row) for row in back], dtype=torch.float64)
        return torch.cat([rows[allowed_N], *(row[None] for row in back)]), torch.cat([gains[allowed_N], gained])

    def _with(self, kept_S: Tensor, block: int, narrow: bool) -> Tensor:
        """The widths with a block put back, as narrow as it may be or whole."""
        row = kept_S.clone()
        row[block] = 1.0
        for one in self.inner[block]:
            row[one] = float(self.widths[one][0] if narrow else self.most[one])
        return row

    def loss(self, kept_S: Tensor) -> float:
        """Importance that is lost under these widths."""
        out = self.gone(kept_S)
        total = sum(float(self.worth[block][1]) for block in out)
        for one in self.sets:
            if one not in self.inner and self.block_of.get(one) not in out:
                total += float(self.worth[one][int(self.most[one])] - self.worth[one][int(kept_S[one])])
        return total

    def rounded(self, unit: int) -> Tensor:
        """See :class:`WidthSearch`: without as many blocks as may go, those that hold most."""
        kept_S = super().rounded(unit)
        able = sorted(set(self.blocks) - self.spared, key=self._size, reverse=True)
        out = set(able[: self.removable]) if self.fixed is None else self.fixed
        for block in self.blocks:
            kept_S[block] = float(block not in out)
            if block in out:
                self.take(kept_S, block, 0)
        return kept_S

    def _size(self, block: int) -> float:
        return sum(self.most[one] for one in self.inner[block])

    def least(self, goals: Sequence[Goal]) -> Tensor:
        """See :class:`WidthSearch`."""
        return self.mask(self.smallest(goals))

    # --- the search ---------------------------------------------------------------------------------------------

    def solve(self, goals: Sequence[Goal], driver: SetCost | None = None) -> Tensor:
        """See :class:`WidthSearch`."""
        self.check(goals)
        if self.near_G is not None:
            near_G = self._without(frozenset(self.gone(self._of_mask(self.near_G))), goals, driver)
            if near_G is not None and self._unused(near_G, goals) == 0:
                return near_G
        best_G = super().solve(goals, driver)
        best = self._of_mask(best_G)
        free = [one for one in self.blocks if one not in self.spared]
        if len(free) <= EXHAUSTIVE:
            for code in range(1 << len(free)):
                choice = frozenset(one for place, one in enumerate(free) if code >> place & 1)
                best, best_G = self._better(best, best_G, choice, goals, driver)
            return best_G
        tried: set[frozenset[int]] = set()
        for _ in range(ROUNDS):
            before, out = best, self.gone(best)
            for choice in [frozenset(out ^ {block}) for block in self._nearest(best, free)]:
                if choice not in tried:
                    tried.add(choice)
                    best, best_G = self._better(best, best_G, choice, goals, driver)
            if best is before:
                break
        return best_G

    def _of_mask(self, keep_G: Tensor) -> Tensor:
        kept = torch.bincount(self.allocator.set_ids, weights=keep_G.double(), minlength=len(self.sets))
        kept_S = self.start_S.clone()
        kept_S[torch.tensor(self.sets)] = kept
        return kept_S

    def _nearest(self, kept_S: Tensor, free: Sequence[int]) -> list[int]:
        """The blocks to try, those first whose importance is nearest to the dearest block that is out."""
        out = self.gone(kept_S)
        edge = max((float(self.worth[one][1]) for one in out), default=0.0)
        return sorted(free, key=lambda one: abs(float(self.worth[one][1]) - edge))[:TRIES]

    def _better(
        self, best: Tensor, best_G: Tensor, out: frozenset[int], goals: Sequence[Goal], driver: SetCost | None
    ) -> tuple[Tensor, Tensor]:
        """The masks with exactly these blocks out, if they are better than the best so far."""
        keep_G = self._without(out, goals, driver)
        if keep_G is None:
            return best, best_G
        kept_S = self._of_mask(keep_G)
        less = self._unused(keep_G, goals) - self._unused(best_G, goals)
        better = less < 0 or (less == 0 and self.loss(kept_S) < self.loss(best) - LEAST)
        return (kept_S, keep_G) if better else (best, best_G)

    def _without(self, out: frozenset[int], goals: Sequence[Goal], driver: SetCost | None) -> Tensor | None:
        """The masks with exactly these blocks out; None where they cannot meet the goals."""
        if len(out) > self.removable:
            return None
        start_S, self.fixed = self.start_S, out
        self.start_S = start_S.clone()
        for block in out:
            self.take(self.start_S, block, 0)
        try:
            return super().solve(goals, driver)
        except TargetError:
            return None
        finally:
            self.start_S, self.fixed = start_S, None

    def _unused(self, keep_G: Tensor, goals: Sequence[Goal]) -> float:
        """Part of a promised latency that these masks leave, 0 where they come near enough to one or none is promised.

        Half of what may be left in the end, as a prediction is not a measurement.
        """
        used = [goal.cost(self._whole(keep_G)) / goal.budget for goal in goals if goal.cost.timed]
        return max(0.0, 1 - UNUSED / 2 - max(used)) if used else 0.0
