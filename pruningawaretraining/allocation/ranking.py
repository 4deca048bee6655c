"""Allocation: scores and a target -> which groups stay.

Shape suffixes: ``_G`` groups, ``_S`` sets of groups, ``_C`` ranking classes.

Groups are ranked within classes (all together, one class a set, or one a topology). Caps, multiples and earlier masks
are part of the ranking, so counts are exact under ties and a cap that binds in one layer moves the rest to others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pruningawaretraining.config.schema import Rule
from pruningawaretraining.errors import TargetError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.groups.reductions import count_nan
from pruningawaretraining.patterns.structures import is_block
from pruningawaretraining.registry import lookup, register

Cost = Callable[[Tensor], float]
UNEVEN_STEPS = 128
SLACK = 1e-6  # of one group: keeps 0.07 * 100 from becoming 6


@register("scope", "global")
def rank_globally(grouping: Grouping) -> Tensor:
    """One ranking over all groups."""
    return torch.zeros(grouping.size, dtype=torch.int64)


@register("scope", "local", "per_layer", "layer")
def rank_locally(grouping: Grouping) -> Tensor:
    """The same sparsity in every set."""
    return grouping.set_ids


@register("scope", "isomorphic")
def rank_isomorphic(grouping: Grouping) -> Tensor:
    """One ranking for each topology of coupled layers (Fang et al. 2024, Isomorphic Pruning)."""
    signatures = [one.signature for one in grouping.sets]
    numbers = {signature: number for number, signature in enumerate(dict.fromkeys(signatures))}
    return torch.tensor([numbers[signature] for signature in signatures], dtype=torch.int64)[grouping.set_ids]


@dataclass(frozen=True)
class Limits:
    """Constraints of an allocation, in every set.

    Args:
        min_sparsity, max_sparsity: bounds on the fraction of the set's groups that go. A set's ``least`` always stay.
        caps: set -> largest fraction of it, where that is less than ``max_sparsity``.
        per_set: (least, most) of each set in order, instead of the fractions above.
        multiple: kept channels are rounded down to a multiple of this, never below one multiple; a set that loses
            nothing keeps its width.
    """

    min_sparsity: float = 0.0
    max_sparsity: float = 1.0
    multiple: int = 1
    caps: Mapping[str, float] = field(default_factory=dict)
    per_set: tuple[tuple[float, float], ...] | None = None

    def least_of(self, count: int) -> list[float]:
        """Least fraction of each of ``count`` sets that goes."""
        return [self.min_sparsity] * count if self.per_set is None else [least for least, _ in self.per_set]

    def most_of(self, grouping: Grouping) -> Tensor:
        """Largest fraction of each set that may be removed."""
        if self.per_set is not None:
            return torch.tensor([most for _, most in self.per_set], dtype=torch.float64)
        most = [min(self.max_sparsity, self.caps.get(one.name, 1.0)) for one in grouping.sets]
        return torch.tensor(most, dtype=torch.float64)


def limits_of(rule: Rule) -> Limits:
    """The limits that a rule of a config sets."""
    caps = rule.max_sparsity_from or {}
    assert not isinstance(caps, str)  # a path has been read with the config
    return Limits(rule.min_sparsity, rule.max_sparsity, rule.multiple, caps)


class Allocator:
    """Ranks groups once, then answers for any sparsity or cost.

    Args:
        grouping: the groups and their sets.
        scores_G: importance, larger is kept; any scale within a ranking class.
        limits: caps and multiples.
        scope: a registered scope.
        removed_G: groups that are masked already (True): they stay so.

    Raises:
        ValueError: scores of the wrong length or with NaN.
    """

    def __init__(
        self,
        grouping: Grouping,
        scores_G: Tensor,
        limits: Limits = Limits(),
        scope: str = "global",
        removed_G: Tensor | None = None,
    ) -> None:
        scores_G = scores_G.detach().cpu().double()
        if scores_G.shape != (grouping.size,) or count_nan(scores_G):
            raise ValueError(f"scores: need {grouping.size} numbers without NaN, got shape {tuple(scores_G.shape)}")
        self.grouping, self.limits = grouping, limits
        self.sizes_S = grouping.set_sizes
        self.set_ids = grouping.set_ids
        removed_G = torch.zeros(grouping.size, dtype=torch.bool) if removed_G is None else removed_G.cpu()
        finite = torch.finfo(scores_G.dtype)  # infinity is for what the limits protect or force
        scores_G = torch.where(removed_G, -torch.inf, scores_G.clamp(finite.min, finite.max))
        self.place_G = _ranks(scores_G, self.set_ids, self.sizes_S, descending=True)
        self.floor_S, self.step_S = self._floors(), self._steps()
        self.forced_G = removed_G | self._forced_by_minimum()
        protected_G = (self.place_G < self.floor_S[self.set_ids]) & ~self.forced_G
        classes = lookup("scope", scope)(grouping)
        self.class_sizes = torch.bincount(classes) if grouping.size else torch.zeros(0, dtype=torch.int64)
        adjusted_G = torch.where(protected_G, torch.inf, torch.where(self.forced_G, -torch.inf, scores_G))
        self.rank_G = _ranks(adjusted_G, classes, self.class_sizes)
        self.classes = classes
        self.least_C = _sums(self.forced_G, classes, len(self.class_sizes))
        self.most_C = self.class_sizes - _sums(protected_G, classes, len(self.class_sizes))
        self.key_G = self.rank_G / self.class_sizes.clamp(min=1)[classes]

    def _floors(self) -> Tensor:
        least = torch.ceil((1 - self.limits.most_of(self.grouping)) * self.sizes_S.double() - SLACK).long()
        least = torch.maximum(least, torch.tensor([one.least for one in self.grouping.sets], dtype=torch.int64))
        step = self._steps()
        rounded = torch.ceil(least / step).long() * step
        blocks = torch.tensor(
            [is_block(one) and self.limits.caps.get(one.name, 1.0) >= 1.0 for one in self.grouping.sets]
        )
        return torch.where(blocks, 0, torch.minimum(rounded, self.sizes_S)) if len(blocks) else rounded

    def _steps(self) -> Tensor:
        multiple = self.limits.multiple
        steps = [1 if is_block(one) else multiple // math.gcd(multiple, one.width) for one in self.grouping.sets]
        return torch.tensor(steps, dtype=torch.int64)

    def _forced_by_minimum(self) -> Tensor:
        least_S = torch.tensor(self.limits.least_of(len(self.sizes_S)), dtype=torch.float64)
        kept_S = self.sizes_S - torch.floor(least_S * self.sizes_S.double() + SLACK).long()
        return self.place_G >= torch.maximum(kept_S, self.floor_S)[self.set_ids]

    def at(self, fraction: float) -> Tensor:
        """Keep mask at a sparsity: removes the ``floor(fraction * groups)`` lowest groups per class, within limits."""
        wanted_C = torch.floor(fraction * self.class_sizes.double() + SLACK).long()
        removed_C = torch.maximum(torch.minimum(wanted_C, self.most_C), self.least_C)
        keep_G = self.rank_G >= removed_C[self.classes]
        if self.limits.multiple == 1:
            return keep_G
        kept_S = _sums(keep_G, self.set_ids, len(self.sizes_S))
        rounded_S = torch.maximum(kept_S // self.step_S * self.step_S, self.floor_S)
        kept_S = torch.where(kept_S == self.sizes_S, kept_S, torch.minimum(rounded_S, self.sizes_S))
        return (self.place_G < kept_S[self.set_ids]) & ~self.forced_G

    def smallest(self) -> Tensor:
        """Smallest keep mask that the limits allow."""
        return self.at(1.0)

    def check_sparsity(self, fraction: float, key: str) -> None:
        """Refuse a sparsity that the limits make unreachable; the last channels of every set are not counted.

        Raises:
            TargetError: the message says what is reachable.
        """
        wanted = math.floor(fraction * self.grouping.size + SLACK)
        reachable = int((~self.smallest()).sum())
        if wanted - reachable > len(self.grouping.sets):
            raise TargetError(
                f"{key}: {fraction:.4g} is out of reach: caps and multiples allow removing at most "
                f"{reachable / self.grouping.size:.4f} of the groups. Lower it, or raise max_sparsity"
            )

    def to_cost(self, cost: Cost, budget: float, *, at_least: float = 0.0, key: str = "target") -> Tensor:
        """Keep mask whose cost is at most ``budget``, and to which no removed group can be given back.

        Args:
            cost: keep mask -> cost, monotone; a ``LinearCost`` is fastest.
            budget: in the units of the cost.
            at_least: a sparsity that must be reached as well.
            key: the key of the config, for messages.

        Raises:
            TargetError: the limits make the budget unreachable; the message says what is reachable.
        """
        keep_G = self.at(at_least)
        if cost(keep_G) <= budget:
            return keep_G
        smallest = self.smallest()
        if cost(smallest) > budget:
            full = cost(torch.ones_like(smallest))
            raise TargetError(
                f"{key}: {budget / full:.4g} of the dense cost is out of reach: caps, multiples and the selected "
                f"layers leave at least {cost(smallest) / full:.4f}. Raise the target or max_sparsity, or select more"
            )
        low, high = at_least, 1.0
        while high - low > 0.25 / max(1, self.grouping.size):
            middle = (low + high) / 2
            low, high = (low, middle) if cost(self.at(middle)) <= budget else (middle, high)
        return self._give_back(self.at(high), cost, budget, at_least)

    def to_uneven_cost(self, cost: Cost, budget: float, *, at_least: float = 0.0, key: str = "target") -> Tensor:
        """:meth:`to_cost` for a cost that may rise where groups go, such as milliseconds at odd widths.

        The mildest of evenly spaced sparsities that meets the budget is taken, and what fits is given back.
        """
        for step in range(UNEVEN_STEPS + 1):
            keep_G = self.at(at_least + (1 - at_least) * step / UNEVEN_STEPS)
            if cost(keep_G) <= budget:
                return self._give_back(keep_G, cost, budget, at_least)
        return self.to_cost(cost, budget, at_least=at_least, key=key)

    def _give_back(self, keep_G: Tensor, cost: Cost, budget: float, at_least: float) -> Tensor:
        """Return removed groups, the most important first, as long as the budget holds."""
        kept_most = self.at(at_least)
        while True:
            allowed_G = ~keep_G & kept_most
            better = self._best_unit(keep_G, allowed_G, cost, budget)
            if better is None:
                return keep_G
            keep_G = better

    def _best_unit(self, keep_G: Tensor, allowed_G: Tensor, cost: Cost, budget: float) -> Tensor | None:
        used = cost(keep_G)
        marginal = getattr(cost, "marginal_G", None)
        # A marginal cost is a lower bound for a unit of several groups, and exact for one.
        affordable_G = allowed_G if marginal is None else allowed_G & (marginal(keep_G) <= budget - used)
        for group in self._by_importance(affordable_G):
            candidate = self._with_unit(keep_G, allowed_G, group)
            if candidate is not None and cost(candidate) <= budget:
                return candidate
        return None

    def _by_importance(self, allowed_G: Tensor) -> list[int]:
        groups = torch.nonzero(allowed_G).flatten()
        if self.limits.multiple > 1 and len(groups):  # one candidate a set is enough: a unit is counted from the top
            best_S = torch.full((len(self.sizes_S),), -1.0, dtype=torch.float64)
            best_S.scatter_reduce_(0, self.set_ids[groups], self.key_G[groups].double(), "amax")
            groups = groups[self.key_G[groups] == best_S[self.set_ids[groups]]]
        return groups[torch.argsort(self.key_G[groups], descending=True, stable=True)].tolist()

    def _with_unit(self, keep_G: Tensor, allowed_G: Tensor, group: int) -> Tensor | None:
        """The mask with ``group`` given back, and with it as many of its set as a multiple needs."""
        candidate = keep_G.clone()
        if self.limits.multiple == 1:
            candidate[group] = True
            return candidate
        number = int(self.set_ids[group])
        one = self.grouping.sets[number]
        inside = slice(one.start, one.stop)
        kept = int(keep_G[inside].sum())
        wanted = min((kept // int(self.step_S[number]) + 1) * int(self.step_S[number]), one.size)
        added = (self.place_G[inside] < wanted) & (allowed_G | keep_G)[inside]
        candidate[inside] |= added
        return candidate if int(candidate[inside].sum()) == wanted else None


def _ranks(scores_G: Tensor, classes_G: Tensor, sizes_C: Tensor, descending: bool = False) -> Tensor:
    """Rank of every group within its class: 0 is the lowest score, or the highest if descending.

    Ties go by index; the lower index is removed first.
    """
    by_score = torch.argsort(scores_G, stable=True)
    order = by_score[torch.argsort(classes_G[by_score], stable=True)]
    starts = torch.cumsum(sizes_C, 0) - sizes_C
    rank = torch.empty_like(classes_G)
    rank[order] = torch.arange(len(order)) - starts[classes_G[order]]
    return sizes_C[classes_G] - 1 - rank if descending else rank


def _sums(mask_G: Tensor, classes_G: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64).index_add_(0, classes_G, mask_G.long())
