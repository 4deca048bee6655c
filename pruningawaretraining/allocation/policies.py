"""How the groups of one rule are chosen under several goals: by ranking, uniformly, or by what a cost saves.

Shape suffixes: ``_D`` groups of the dense model, ``_R`` groups of one rule, ``_S`` sets of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pruningawaretraining.allocation.goals import Goal
from pruningawaretraining.allocation.knapsack import Searched, WidthSearch
from pruningawaretraining.allocation.ranking import Allocator, limits_of
from pruningawaretraining.allocation.structures import StructureSearch
from pruningawaretraining.config.schema import Rule
from pruningawaretraining.config.structures import compete
from pruningawaretraining.costs.widths import KeptGroups, SetCost
from pruningawaretraining.criteria.base import needs_of
from pruningawaretraining.errors import ConfigError, TargetError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.patterns.structures import is_block
from pruningawaretraining.registry import lookup, register


class RuleView(Protocol):
    """One rule's share of the model.

    Attributes:
        key: how messages call the rule.
        rule: its configuration; of a family's member, with its target alone.
        before: the configuration of the member before it, or None.
        sets: numbers of its sets.
        groups_D: its groups among the dense model's.
        grouping: the same groups alone.
        inside: number of a set of the model that lies in a residual block -> that block's.
    """

    key: str
    sets: list[int]
    groups_D: Tensor
    grouping: Grouping
    inside: dict[int, int]

    @property
    def rule(self) -> Rule: ...

    @property
    def before(self) -> Rule | None: ...


@dataclass(frozen=True, eq=False)
class Task:
    """An allocation to make.

    Args:
        share: the rule.
        scores_R: importance.
        keep_D: what the model keeps now.
        set_ids_D: the set of each of the model's groups.
        goals: what must hold.
        costs: cost by name ("macs", "parameters", "latency"), for allocations that weigh one.
        at_least: fraction of the rule's groups that must go as well.
        near_R: masks that were measured; the same blocks are out again, if that will do.
    """

    share: RuleView
    scores_R: Tensor
    keep_D: Tensor
    set_ids_D: Tensor
    goals: Sequence[Goal]
    costs: Callable[[str], SetCost]
    at_least: float = 0.0
    near_R: Tensor | None = None

    def allocator(self, scope: str | None = None) -> Allocator:
        """The rule's groups ranked within a scope, by default its own."""
        share = self.share
        removed_R = ~self.keep_D[share.groups_D]
        return Allocator(share.grouping, self.scores_R, limits_of(share.rule), scope or share.rule.scope, removed_R)

    def search(self) -> WidthSearch:
        """A search over the widths of the rule's sets."""
        share, found = self.share, self.allocator()
        searched = Searched(found, self.scores_R, share.sets, share.groups_D, self.keep_D, self.set_ids_D)
        blocks = [n for n, one in zip(share.sets, share.grouping.sets, strict=True) if is_block(one)]
        return StructureSearch(searched, blocks, share.inside, self.near_R) if blocks else WidthSearch(searched)

    def check(self) -> None:
        """Refuse a goal that is out of reach, whatever the allocation.

        Raises:
            TargetError: the message names it, and what is reachable.
        """
        timed = any(one.cost.timed for one in self.goals)
        if compete(self.share.rule.pattern) or (self.share.rule.allocation not in RANKED and timed):
            self.search().check(self.goals)
            return
        allocator = self.allocator(RANKED.get(self.share.rule.allocation or "ranking"))
        smallest = allocator.smallest()
        for goal in self.goals:
            cost = SubCost(goal.cost, self.share.groups_D, self.keep_D)
            if cost(smallest) <= goal.budget:
                continue
            reach = allocator.to_uneven_cost if goal.cost.timed else allocator.to_cost
            try:
                reach(cost, goal.budget, key=goal.key)
            except TargetError as error:
                raise goal.out_of_reach(cost(smallest)) from error


class SubCost:
    """A cost of the model as a function of one rule's groups, with the others fixed."""

    def __init__(self, cost: Any, groups_D: Tensor, keep_D: Tensor) -> None:
        self.cost, self.groups_D, self.keep_D = cost, groups_D, keep_D

    def _whole(self, keep_R: Tensor) -> Tensor:
        whole = self.keep_D.clone()
        whole[self.groups_D] = keep_R
        return whole

    def __call__(self, keep_R: Tensor) -> float:
        return float(self.cost(self._whole(keep_R)))

    def marginal_G(self, keep_R: Tensor) -> Tensor:
        """Lower bound on the cost of adding each group alone."""
        found: Tensor = self.cost.marginal_G(self._whole(keep_R))
        return found[self.groups_D]


class AllOf:
    """Several goals as one cost: how far the worst is from its budget, as a factor.

    Args:
        goals: with costs that know their marginals.
    """

    def __init__(self, goals: Sequence[Goal]) -> None:
        self.goals = goals

    def __call__(self, keep_D: Tensor) -> float:
        return max(goal.cost(keep_D) / goal.budget for goal in self.goals)

    def marginal_G(self, keep_D: Tensor) -> Tensor:
        """At least what adding each group alone would cost."""
        after = [(goal.cost(keep_D) + _marginal(goal.cost, keep_D)) / goal.budget for goal in self.goals]
        return (torch.stack(after).amax(0) - self(keep_D)) * ~keep_D


def _marginal(cost: Any, keep_D: Tensor) -> Tensor:
    found: Tensor = cost.marginal_G(keep_D)
    return found


RANKED = {"ranking": None, "uniform": "local"}
"""Allocations that go by ranks, with the scope that they need; ``final_sparsity`` is for them."""


def allocation_of(rule: Rule) -> str:
    """The allocation of a rule whose target is about costs.

    Without one of its own it is by latency where the target is; by the cost of the target where the criterion's scores
    are losses that add up; and by ranking otherwise.
    """
    target = rule.target
    if rule.allocation is not None:
        return rule.allocation
    if target.latency is not None or target.latency_ms is not None:
        return "latency"
    named = rule.criterion if isinstance(rule.criterion, str) else rule.criterion["type"]
    if not compete(rule.pattern) and not needs_of(lookup("criterion", named)).adds_up:
        return "ranking"
    return "parameters" if target.macs is None and target.parameters is not None else "macs"


def scope_of(share: RuleView) -> str:
    """The scope in which the groups of a rule are ranked under a sparsity.

    Raises:
        ConfigError: its allocation weighs what a cost saves, and its target is a sparsity alone.
    """
    rule = share.rule
    if rule.allocation is not None and rule.allocation not in RANKED and not rule.target.about_costs:
        raise ConfigError(
            f"{share.key}.allocation: {rule.allocation!r} weighs importance against a cost, and the target is a "
            f"sparsity alone. Allowed with it: {', '.join(RANKED)}"
        )
    return RANKED.get(rule.allocation or "ranking") or rule.scope


# --- allocations ----------------------------------------------------------------------------------------------------


@register("allocation", "ranking", "global")
def allocate_by_ranking(task: Task) -> Tensor:
    """Remove the lowest scores of the rule's scope until every goal holds; then give back what fits."""
    return _ranked(task, task.allocator())


@register("allocation", "uniform")
def allocate_uniformly(task: Task) -> Tensor:
    """Remove the same fraction of every set until every goal holds."""
    return _ranked(task, task.allocator("local"))


@register("allocation", "latency")
def allocate_by_latency(task: Task) -> Tensor:
    """Remove the least importance per millisecond saved, along widths that are fast on the runtime."""
    return _weighed(task, "latency")


@register("allocation", "macs")
def allocate_by_macs(task: Task) -> Tensor:
    """Remove the least importance per MAC saved."""
    return _weighed(task, "macs")


@register("allocation", "parameters")
def allocate_by_parameters(task: Task) -> Tensor:
    """Remove the least importance per parameter saved."""
    return _weighed(task, "parameters")


def _ranked(task: Task, allocator: Allocator) -> Tensor:
    share = task.share
    if len(task.goals) == 1:
        goal = task.goals[0]
        cost = SubCost(goal.cost, share.groups_D, task.keep_D)
        reach = allocator.to_uneven_cost if goal.cost.timed else allocator.to_cost
        return reach(cost, goal.budget, at_least=task.at_least, key=goal.key)
    task.check()
    cost = SubCost(AllOf(task.goals), share.groups_D, task.keep_D)
    uneven = any(goal.cost.timed for goal in task.goals)
    reach = allocator.to_uneven_cost if uneven else allocator.to_cost
    return reach(cost, 1.0, at_least=task.at_least, key=f"{share.key}.target")


def _weighed(task: Task, name: str) -> Tensor:
    driver = next((goal.cost for goal in task.goals if goal.key.endswith(f".{name}")), None) or task.costs(name)
    return task.search().solve(goals_of(task), driver)


def goals_of(task: Task) -> list[Goal]:
    """All that must hold: the goals, and the fraction of the rule's groups that must go."""
    return [*task.goals, *([_sparsity_goal(task.share, task)] if task.at_least > 0 else [])]


def _sparsity_goal(share: RuleView, task: Task) -> Goal:
    sizes_S = torch.bincount(task.set_ids_D).double()
    counted_S = torch.zeros(len(sizes_S), dtype=torch.bool)
    counted_S[torch.tensor(share.sets)] = True
    counted_D = torch.zeros(len(task.keep_D), dtype=torch.bool)
    counted_D[share.groups_D] = True
    budget = float(share.grouping.size - int(task.at_least * share.grouping.size + 1e-6))
    return Goal(f"{share.key}.target.sparsity", KeptGroups(counted_S, sizes_S, counted_D), budget)
