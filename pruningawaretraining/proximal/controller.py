"""Drives lambda so that a run ends on a cost target.

Shape suffixes: ``_G`` groups.

The latents are never shrunk, so at any moment the cost is a falling function of the threshold alone: a group is 0 when
its norm, divided by its weight tau, is at most ``lambda * gamma``. The threshold that meets a budget can then be looked
up instead of guessed. The controller lets the budget fall from the dense cost to the target, moves the threshold
towards what the budget needs, and at the end sets exactly that. In between it lowers lambda as gamma grows, so that the
threshold is what it was meant to be.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruningawaretraining.costs.macs import macs_cost, macs_per_layer
from pruningawaretraining.errors import ConfigError, TargetError
from pruningawaretraining.proximal.coupled import CoupledChannelGrouper, CoupledGrouper
from pruningawaretraining.proximal.optimizer import PruneOptimizer, advanced
from pruningawaretraining.proximal.options import gamma_key, number, whole
from pruningawaretraining.proximal.wrapper import NEVER
from pruningawaretraining.schedules import sparsity_at

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PathPoint:
    """One adjustment.

    Args:
        step: steps of the optimizer so far.
        reg_lambda: now.
        threshold: ``reg_lambda * gamma``, from here on.
        cost: reached now, as a fraction of the dense cost.
        budget: allowed now, as a fraction of the dense cost.
    """

    step: int
    reg_lambda: float
    threshold: float
    cost: float
    budget: float


class LambdaController:
    """Raises and lowers ``reg_lambda`` of a coupled proximal step; call :meth:`step` after every optimizer step, or
    register it as a step post-hook of the optimizer.

    Adjustments wait for the device, the steps between them do not. At ``end`` the target is met, to the last group;
    let healing begin there (``healing_start_step=end``), and what is 0 stays so.

    Args:
        optimizer: with a param group whose ``group_type`` is ``grouper``.
        grouper: the coupled groups.
        cost: keep mask -> cost, falling with every group that goes, such as
            :func:`pruningawaretraining.costs.macs.macs_cost`.
        target: fraction of the dense cost that is kept, in (0, 1].
        start, end: steps of the optimizer between which the budget falls. Healing begins at ``end``, also of an
            optimizer that was made without it.
        every: steps between adjustments.
        schedule: registered schedule of the way from the dense cost to the target.
        gain: how far the threshold goes, on a logarithmic scale, towards what the budget needs, in (0, 1].

    Raises:
        ConfigError: a value that is not allowed, or the optimizer has no such groups.
        TargetError: no threshold reaches the target.
    """

    def __init__(
        self,
        optimizer: PruneOptimizer,
        grouper: CoupledGrouper,
        cost: Callable[[Tensor], float],
        target: float,
        start: int,
        end: int,
        every: int = 10,
        schedule: str = "cubic",
        gain: float = 0.5,
    ) -> None:
        self.start, self.end, self.every = whole(start, "start", 0), whole(end, "end"), whole(every, "every")
        if end <= start or end > optimizer.healing_start_step or start < optimizer.warmup_steps:
            raise ConfigError(
                f"end: {end} is not allowed. Allowed: warm-up <= start < end <= healing_start_step "
                f"({optimizer.warmup_steps} <= {start} < end <= {optimizer.healing_start_step})"
            )
        if optimizer.healing_start_step not in (NEVER, end):
            raise ConfigError(
                f"end: {end} is not healing_start_step, {optimizer.healing_start_step}, and steps between them would "
                "shrink the groups below the target. Allowed: the same for both, or no healing_start_step"
            )
        if not 0 < number(target, "target", 0) <= 1 or not 0 < number(gain, "gain", 0) <= 1:
            raise ConfigError(f"target, gain: {target}, {gain} are not allowed. Allowed: numbers in (0, 1]")
        self.optimizer, self.grouper, self.cost, self.target = optimizer, grouper, cost, target
        self.schedule, self.gain = schedule, gain
        self.dense = cost(torch.ones(grouper.grouping.size, dtype=torch.bool))
        self.threshold: float | None = None
        self.path: list[PathPoint] = []
        sparsity_at(schedule, 0.5)
        optimizer.groups_of(grouper)
        self._check_reachable()
        optimizer.healing_start_step = self.end  # zeros stay zero from here: shrinking on would miss the target

    @classmethod
    def for_macs(
        cls,
        optimizer: PruneOptimizer,
        grouper: CoupledChannelGrouper,
        target: float,
        start: int,
        end: int,
        **options: Any,
    ) -> LambdaController:
        """A controller of the MACs on the grouper's example inputs.

        Args:
            optimizer, grouper, target, start, end: see the class.
            options: ``every``, ``schedule`` and ``gain``.
        """
        per_layer = macs_per_layer(grouper.model, grouper.example_inputs, grouper.forward_fn)
        return cls(optimizer, grouper, macs_cost(grouper.channels.grouping, per_layer), target, start, end, **options)

    def _check_reachable(self) -> None:
        keep_G = self._keep(torch.zeros(self.grouper.grouping.size, dtype=torch.float64), 0.0)
        least = self.cost(keep_G) / self.dense
        if least > self.target:
            raise TargetError(f"target: {self.target} is out of reach: the groups leave at least {least:.4f}. Raise it")

    @property
    def done(self) -> bool:
        """Whether the end has been reached."""
        return bool(self.path) and self.path[-1].step >= self.end

    def budget(self, step: int) -> float:
        """The fraction of the dense cost that is allowed at a step."""
        t = (step - self.start) / (self.end - self.start)
        return 1.0 - sparsity_at(self.schedule, t, 0.0, 1.0 - self.target)

    @torch.no_grad()
    def step(self) -> None:
        """Adjust the threshold if it is time to, and lambda to the threshold."""
        now = self.optimizer.num_steps
        if self.done or now <= self.start:
            return
        groups = self.optimizer.groups_of(self.grouper)
        if now >= self.end or (now - self.start) % self.every == 0:
            self._adjust(groups, now)
        if self.threshold is not None and not self.done:
            gamma = advanced(groups[0][gamma_key(groups[0])], groups[0]["lr"])  # at the next step
            self._set(groups, self.threshold / gamma)

    def _set(self, groups: list[dict[str, Any]], reg_lambda: float | Tensor) -> None:
        for group in groups:
            group["reg_lambda"] = reg_lambda

    def _adjust(self, groups: list[dict[str, Any]], now: int) -> None:
        ratio_G = self.optimizer.threshold_norms(self.grouper).double().cpu()
        gamma, reg_lambda = float(groups[0][gamma_key(groups[0])]), float(groups[0]["reg_lambda"])
        budget = self.budget(now)
        wanted = self._threshold(ratio_G, budget)
        final = now >= self.end
        current = reg_lambda * gamma if self.threshold is None else self.threshold
        self.threshold = wanted if final else moved(current, wanted, self.gain)
        if final:
            reg_lambda = wanted / gamma
            self._set(groups, reg_lambda)
            self.optimizer.reproject(self.grouper)
        reached = self.cost(self._keep(ratio_G, reg_lambda * gamma)) / self.dense
        self.path.append(PathPoint(now, reg_lambda, self.threshold, reached, budget))
        logger.info("step %d: lambda %.4g, %.4f of the cost, %.4f allowed", now, reg_lambda, reached, budget)

    def _keep(self, ratio_G: Tensor, threshold: float) -> Tensor:
        """Which groups stay at a threshold."""
        keep_G = ratio_G > threshold
        protected_G = self.grouper.balance().protected_G(ratio_G)
        return keep_G if protected_G is None else keep_G | protected_G

    def _threshold(self, ratio_G: Tensor, budget: float) -> float:
        """The smallest threshold within a budget, halfway to the next group so that rounding cannot matter; 0 if the
        budget holds as it is."""
        allowed = budget * self.dense
        if self.cost(self._keep(ratio_G, -1.0)) <= allowed:
            return 0.0
        values = torch.unique(ratio_G)
        low, high = 0, len(values) - 1
        while low < high:
            middle = (low + high) // 2
            fits = self.cost(self._keep(ratio_G, float(values[middle]))) <= allowed
            low, high = (low, middle) if fits else (middle + 1, high)
        above = float(values[low + 1]) if low + 1 < len(values) else 2 * float(values[low])
        return (float(values[low]) + above) / 2

    def report(self) -> list[dict[str, float]]:
        """The path so far as plain data, one dict for each adjustment."""
        return [vars(point).copy() for point in self.path]

    def state_dict(self) -> dict[str, Any]:
        """The threshold and the path; lambda itself is in the optimizer's state."""
        return {"threshold": self.threshold, "path": self.report()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a path."""
        self.threshold = state["threshold"]
        self.path = [PathPoint(**point) for point in state["path"]]


def moved(current: float, wanted: float, gain: float) -> float:
    """Part of the way from one threshold to another, on a logarithmic scale; the whole way from 0, and a plain fraction
    of the way to 0."""
    if current <= 0:
        return wanted
    if wanted <= 0:
        return current * (1 - gain)
    return math.exp((1 - gain) * math.log(current) + gain * math.log(wanted))
