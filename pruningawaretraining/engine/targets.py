"""Targets of rules on channels: MACs, parameters, peak memory, latency, registered costs; several must all hold.

Shape suffixes: ``_D`` groups of the dense model, ``_R`` groups of one rule, ``_A`` anchors.

Costs are made when the first rule asks for them, while the model is still dense. Latency is predicted by a fitted cost
and corrected by measuring, at every event, a copy of the model from which the masked channels are removed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.allocation.goals import Goal
from pruningawaretraining.allocation.policies import RANKED, RuleView, Task, allocation_of
from pruningawaretraining.allocation.uniform import evened, uniform
from pruningawaretraining.config.schema import Rule
from pruningawaretraining.config.targets import Target
from pruningawaretraining.costs.latency.meter import Meter, RuntimeMeter
from pruningawaretraining.costs.macs import LinearCost, macs_cost, macs_per_layer
from pruningawaretraining.costs.memory import MemoryCost, memory_cost
from pruningawaretraining.costs.weighted import LayerCost, weighted
from pruningawaretraining.costs.widths import LinearBySets, SetCost
from pruningawaretraining.engine.aiming import aimed
from pruningawaretraining.engine.latency_target import LatencyReached, LatencyTarget
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.masks.pruned_copy import pruned_copy
from pruningawaretraining.models.calling import ForwardFn, device_of
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.patterns.structures import modules_of_blocks
from pruningawaretraining.registry import lookup
from pruningawaretraining.schedules import sparsity_at

ROUNDS = 8  # of allocating and measuring until a latency target holds and is used


class Targets:
    """The targets of every rule of one model, with the costs that they are about.

    Args:
        model: dense.
        found: its channels.
        macs, parameters: its costs.
        inputs, forward_fn: how to run it.
        meter: makes what measures for a target; by default on its runtime.
    """

    def __init__(
        self,
        model: nn.Module,
        found: ChannelGroups,
        macs: LinearCost,
        parameters: LinearCost,
        inputs: Any,
        forward_fn: ForwardFn | None = None,
        meter: Callable[[Target], Meter] | None = None,
    ) -> None:
        self._model, self._found, self._inputs, self._forward_fn = model, found, inputs, forward_fn
        self._linear = macs
        self._costs: dict[str, SetCost] = {
            "macs": LinearBySets(macs, found.grouping),
            "parameters": LinearBySets(parameters, found.grouping),
        }
        self._latencies: dict[tuple[Any, ...], LatencyTarget] = {}
        self._meter = meter or (lambda target: _runtime_meter(target, model))
        self.set_ids_D = found.grouping.set_ids

    def goals(self, share: RuleView, rule: Rule | None = None) -> list[Goal]:
        """The budgets of a rule besides its sparsity.

        Args:
            share: the rule.
            rule: the configuration of another member of its family.

        Raises:
            ConfigError: a runtime that is not there, or a cost of which the model has none.
            ModelError: the runtime cannot run the model.
        """
        target, key = (rule or share.rule).target, f"{share.key}.target"
        goals = [
            Goal(f"{key}.{name}", self._cost(name), fraction * self._cost(name).dense)
            for name, fraction in target.fractions.items()
            if name != "latency"
        ]
        for one in goals:
            if one.cost.dense <= 0:
                raise ConfigError(f"{one.key}: this cost of the model is 0. Allowed: a cost that pruning can lower")
        if target.latency is not None or target.latency_ms is not None:
            goals.append(self._latency_goal(share, target))
        return goals

    def _latency_goal(self, share: RuleView, target: Target) -> Goal:
        """The lower of a latency that is a fraction, and one in milliseconds."""
        key, latency = f"{share.key}.target", self._latency_of(share)
        goals = []
        if (fraction := target.fractions.get("latency")) is not None:
            asked = f"{fraction:g} of the dense cost"
            goals.append(Goal(f"{key}.latency", latency.cost, fraction * latency.dense_ms, asked, "ms"))
        if (most := target.numbers.get("latency_ms")) is not None:
            goals.append(Goal(f"{key}.latency_ms", latency.cost, most, f"{most:g} ms", "ms"))
        return min(goals, key=lambda goal: goal.budget)

    def _latency_of(self, share: RuleView) -> LatencyTarget:
        """The latency of a rule's target; what cannot be measured is said of the rule."""
        try:
            return self.latency(share.rule.target)
        except ConfigError as error:
            key, text = f"{share.key}.target", str(error)
            if text.startswith("target."):
                raise ConfigError(f"{share.key}.{text}") from error
            raise ConfigError(f"{key}.runtime: {text.removeprefix('runtime: ')}") from error

    def _cost(self, name: str) -> SetCost:
        if name not in self._costs:
            self._costs[name] = self._memory() if name == "peak_memory" else self._registered(name)
        return self._costs[name]

    def _registered(self, name: str) -> SetCost:
        """A registered cost of the dense model as a function of its masks."""
        function: LayerCost = lookup("cost", name)
        per_layer = weighted(self._model, macs_per_layer(self._model, self._inputs, self._forward_fn), function)
        return LinearBySets(macs_cost(self._found.grouping, per_layer, self._found.costs()), self._found.grouping)

    def _memory(self) -> MemoryCost:
        found, blocks = self._found, modules_of_blocks(self._found)
        without = partial(pruned_copy, self._model, found)
        return memory_cost(found.grouping, without, self._inputs, self._forward_fn, blocks)

    def latency(self, target: Target) -> LatencyTarget:
        """The latency that a target is about; measured at the first call, while the model is dense."""
        key = (target.runtime, target.batch, target.threads)
        if key not in self._latencies:
            found, inputs = self._found, self._inputs
            made = LatencyTarget(self._model, found, self._linear, inputs, self._forward_fn, self._meter(target))
            self._latencies[key] = made
        return self._latencies[key]

    def check(self, share: RuleView, rule: Rule) -> None:
        """Refuse goals that no mask within the limits reaches.

        Args:
            share: the rule.
            rule: the configuration whose target it is: of a family that of its last member.

        Raises:
            TargetError: the message names the goal, and what is reachable.
        """
        goals = self.goals(share, rule)
        everything = torch.ones(len(self.set_ids_D), dtype=torch.bool)
        scores_R = torch.zeros(share.grouping.size)
        for goal in goals:
            alone = Task(share, scores_R, everything, self.set_ids_D, [goal], self._costs_for(share))
            alone.check()

    def check_sharded(self, share: RuleView) -> None:
        """Refuse what copies the model at events, once ``fully_shard`` has spread its parameters.

        Raises:
            ConfigError: a latency.
        """
        target = share.rule.target
        for name in ("latency", "latency_ms"):
            if getattr(target, name) is not None:
                raise ConfigError(
                    f"{share.key}.target.{name}: {getattr(target, name)} is measured on copies of the model, and "
                    "fully_shard has spread its parameters. Allowed: macs, parameters, peak_memory or sparsity, or "
                    "DistributedDataParallel"
                )

    def _costs_for(self, share: RuleView) -> Callable[[str], SetCost]:
        def cost(name: str) -> SetCost:
            return self._latency_of(share).cost if name == "latency" else self._cost(name)

        return cost

    def decide(
        self,
        share: RuleView,
        scores_R: Tensor,
        keep_D: Tensor,
        progress: float,
        copied: Callable[[Tensor], nn.Module] | None,
        rounds: int = ROUNDS,
    ) -> tuple[Tensor, bool, LatencyReached | None]:
        """The rule's next masks.

        Args:
            share: the rule.
            scores_R: importance of its groups.
            keep_D: what the model keeps now.
            progress: how far its schedule has come; 1 at its last event.
            copied: a copy of the model, as it is now, without the groups that a mask of all groups drops; None: no
                latency is measured.
            rounds: of allocating and measuring at most.

        Returns:
            Its masks, whether its target is met with them, and the latency where the target is about it.
        """
        rule, goals = share.rule, self.goals(share)
        timed = next((goal for goal in goals if goal.cost.timed), None)
        name = allocation_of(rule)
        allocate: Callable[[Task], Tensor] = lookup("allocation", name)
        allocate = evened(allocate) if rule.widths == "uniform" else allocate
        at_least = rule.target.last_sparsity or 0.0
        task = Task(share, scores_R, keep_D, self.set_ids_D, goals, self._costs_for(share), at_least)
        if progress >= 1:
            keep_R, met = allocate(task), True
        elif name in RANKED and rule.final_sparsity is not None:
            keep_R, met = self._by_sparsity(task, RANKED[name], progress, allocate)
        else:
            keep_R, met = allocate(self._milder(task, sparsity_at(rule.schedule, progress))), False
        if timed is None or copied is None:
            return keep_R, met, None
        return self._measured(task, timed, keep_R, met, allocate, copied, rounds)

    def _milder(self, task: Task, part: float) -> Task:
        """The task of an event that goes a part of the way: from the member before, or from the dense model."""
        share, before = task.share, task.share.before
        fewest = 0.0 if before is None else before.target.last_sparsity or 0.0
        dense = [one.cost.dense for one in task.goals]
        starts = dense if before is None else [one.budget for one in self.goals(share, before)]
        goals = [
            replace(one, budget=start + part * (one.budget - start))
            for one, start in zip(task.goals, starts, strict=True)
        ]
        return replace(task, goals=goals, at_least=fewest + part * (task.at_least - fewest))

    def _measured(
        self,
        task: Task,
        timed: Goal,
        keep_R: Tensor,
        met: bool,
        allocate: Callable[[Task], Tensor],
        copied: Callable[[Tensor], nn.Module],
        rounds: int,
    ) -> tuple[Tensor, bool, LatencyReached | None]:
        """Measure the copy; at the last event choose again until the budget is used."""
        latency = self._latency_of(task.share)

        def measure(keep_R: Tensor) -> LatencyReached:
            whole = task.keep_D.clone()
            whole[task.share.groups_D] = keep_R
            return latency.measure(whole, copied(whole), timed.budget)

        def choose(budget: float, near_R: Tensor) -> Tensor:
            goals = [replace(one, budget=budget) if one is timed else one for one in task.goals]
            return allocate(replace(task, goals=goals, near_R=near_R))  # predictions of like masks err alike

        if not met:
            return keep_R, met, measure(keep_R)
        keep_R, reached = aimed(latency.cost, timed, keep_R, measure, choose, rounds)
        return keep_R, met, reached

    def _by_sparsity(
        self, task: Task, scope: str | None, progress: float, allocate: Callable[[Task], Tensor]
    ) -> tuple[Tensor, bool]:
        """The masks of an event that heads for ``final_sparsity``; when they meet all goals, those that just do."""
        rule = task.share.rule
        keep_R = task.allocator(scope).at(sparsity_at(rule.schedule, progress, 0.0, rule.final_sparsity or 1.0))
        keep_R = uniform(task.share.grouping, keep_R, task.scores_R) if rule.widths == "uniform" else keep_R
        whole = task.keep_D.clone()
        whole[task.share.groups_D] = keep_R
        if any(goal.cost(whole) > goal.budget for goal in task.goals):
            return keep_R, False
        return allocate(task), True


def _runtime_meter(target: Target, model: nn.Module) -> Meter:
    return RuntimeMeter(target.runtime, target.batch, target.threads, device=device_of(model))
