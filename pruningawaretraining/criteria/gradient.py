"""Criteria that need gradients: gathered once in every optimizer step, scored at every event.

Shape suffixes: ``_G`` groups, ``_M`` gradients kept, ``_W`` any weight.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pruningawaretraining.criteria.base import Needs, Statistics
from pruningawaretraining.criteria.gradient_collectors import (
    SCORE,
    SEEN,
    STEPS,
    GradientCollector,
    GradientRule,
)
from pruningawaretraining.groups.grouping import Grouping, Member
from pruningawaretraining.groups.reductions import Reduction, reduce_sum
from pruningawaretraining.registry import lookup, register

logger = logging.getLogger(__name__)


@register("criterion", "weight", "abs")
@dataclass(frozen=True)
class Weight:
    """``|w|^p`` reduced over the group, layers not made comparable.

    Args:
        p: the power, above 0.
        reduction: "mean", "sum" or "max" over the group.
        half: scores in bfloat16.
    """

    needs: ClassVar[Needs] = Needs(whole_layers=False)

    p: float = 1.0
    reduction: str = "mean"
    half: bool = False

    def __post_init__(self) -> None:
        if self.p <= 0:
            raise ValueError(f"p: {self.p!r} must be above 0")
        lookup("reduction", self.reduction, "reduction")

    def score(self, grouping: Grouping, statistics: Statistics) -> Tensor:
        """See :class:`~pruningawaretraining.criteria.base.Criterion`."""

        def size(member: Member) -> Tensor:
            size_W = member.parameter.detach().float().abs()
            return size_W if self.p == 1 else size_W.pow_(self.p)

        reduce: Reduction = lookup("reduction", self.reduction)
        return reduce(grouping, size, torch.bfloat16 if self.half else torch.float32)


@dataclass(frozen=True)
class _FromGradients:
    """Base of the gradient criteria.

    A group none of whose weights has ever had a gradient (a frozen layer) scores infinity: it goes last. Before the
    first gradient of all, weights are ranked by their size.

    Args:
        momentum: how much of the score stays at the next step: 0 for the last step alone, 1 for the sum of all.
        reduction: "mean", "sum" or "max" over the group.
        half: scores in bfloat16.
    """

    needs: ClassVar[Needs] = Needs(whole_layers=False)

    momentum: float = 0.0
    reduction: str = "mean"
    half: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum: {self.momentum!r} must be in [0, 1]")
        lookup("reduction", self.reduction, "reduction")

    def combine(self, weight_W: Tensor, gradient_W: Tensor) -> Tensor:
        """The value of every weight."""
        raise NotImplementedError

    def finish(self, values: Tensor) -> Tensor:
        """Applied to reduced values."""
        return values

    def collector(self) -> GradientCollector:
        """A new collector."""
        dtype = torch.bfloat16 if self.half else torch.float32
        return GradientCollector(GradientRule(self.combine, self.finish, self.reduction, self.momentum, 1.0, dtype))

    def score(self, grouping: Grouping, statistics: Statistics) -> Tensor:
        """See :class:`~pruningawaretraining.criteria.base.Criterion`."""
        known = statistics.tensors
        if STEPS not in known or int(known[STEPS]) == 0:
            logger.warning("%s: no gradient has been seen yet; weights are ranked by size", type(self).__name__)
            return Weight(reduction=self.reduction, half=self.half).score(grouping, statistics)
        if SCORE in known:
            scores_G = known[SCORE]
        else:
            reduce: Reduction = lookup("reduction", self.reduction)
            scores_G = reduce(grouping, lambda member: known.get(f"{SCORE}.{member.name}"), torch.float32)
        return _unseen_last(scores_G, grouping, known)


def _unseen_last(scores_G: Tensor, grouping: Grouping, known: dict[str, Tensor]) -> Tensor:
    unseen = [member.name for member in grouping.members if f"{SEEN}.{member.name}" not in known]
    if not unseen:
        return scores_G
    logger.info("no gradient ever reached %s; they are pruned last", ", ".join(dict.fromkeys(unseen)))

    def seen(member: Member) -> Tensor | None:
        return None if f"{SEEN}.{member.name}" not in known else torch.ones_like(member.parameter)

    return torch.where(reduce_sum(grouping, seen, torch.float32).to(scores_G.device) > 0, scores_G, torch.inf)


@register("criterion", "gradient")
@dataclass(frozen=True)
class Gradient(_FromGradients):
    """``|g|`` of the last step.

    Args:
        momentum: how much of the score stays at the next step.
        reduction: "mean", "sum" or "max" over the group.
        half: scores in bfloat16.
    """

    def combine(self, weight_W: Tensor, gradient_W: Tensor) -> Tensor:
        return gradient_W.abs()


@register("criterion", "snip")
@dataclass(frozen=True)
class Snip(_FromGradients):
    """``|w g|`` of the last step (Lee et al. 2019, SNIP).

    Args:
        momentum: how much of the score stays at the next step.
        reduction: "mean", "sum" or "max" over the group.
        half: scores in bfloat16.
    """

    needs: ClassVar[Needs] = Needs(whole_layers=False, loss=True)

    def combine(self, weight_W: Tensor, gradient_W: Tensor) -> Tensor:
        return (weight_W * gradient_W).abs_()


@register("criterion", "snip_momentum")
@dataclass(frozen=True)
class SnipMomentum(Snip):
    """``S <- momentum S + |w g|`` at every step.

    Args:
        momentum: how much of the score stays at the next step.
        reduction: "mean", "sum" or "max" over the group.
        half: scores in bfloat16.
    """

    momentum: float = 0.9


@register("criterion", "movement")
@dataclass(frozen=True)
class Movement(_FromGradients):
    """``S <- momentum S - w g``: weights that move towards zero go first (Sanh et al. 2020, Movement Pruning).

    Args:
        momentum: how much of the score stays at the next step; 1 sums all steps, as in the paper.
        reduction: "mean", "sum" or "max" over the group.
        half: scores in bfloat16.
    """

    momentum: float = 1.0

    def combine(self, weight_W: Tensor, gradient_W: Tensor) -> Tensor:
        return (weight_W * gradient_W).neg_()


@register("criterion", "taylor")
@dataclass(frozen=True)
class Taylor(_FromGradients):
    """``|sum of w g|`` over the group: the first-order change of the loss when it goes (Molchanov et al. 2017).

    Args:
        momentum: how much of the score stays at the next step.
        reduction: "sum", "mean" or "max" over the group.
        half: scores in bfloat16.
    """

    needs: ClassVar[Needs] = Needs(whole_layers=False, loss=True)

    momentum: float = 0.9
    reduction: str = "sum"

    def combine(self, weight_W: Tensor, gradient_W: Tensor) -> Tensor:
        return weight_W * gradient_W

    def finish(self, values: Tensor) -> Tensor:
        return values.abs()


@register("criterion", "taylor_squared")
@dataclass(frozen=True)
class TaylorSquared(Taylor):
    """``(sum of w g)^2`` over the group (Molchanov et al. 2019, eq. 8).

    Args:
        momentum: how much of the score stays at the next step.
        reduction: "sum", "mean" or "max" over the group.
        half: scores in bfloat16.
    """

    needs: ClassVar[Needs] = Needs(whole_layers=False)

    def finish(self, values: Tensor) -> Tensor:
        return values.square()


@register("criterion", "block_mask")
@dataclass(frozen=True)
class BlockMask(Taylor):
    """``S <- momentum S + |dL/dm|`` for a factor m = 1 on every group.

    With ``w * expand(m)`` in the forward pass, ``dL/dm = reduce(w dL/dw)``: no factor has to be put into the model.

    Args:
        momentum: how much of the score stays at the next step.
        reduction: "sum", "mean" or "max" over the group.
        half: scores in bfloat16.
    """
