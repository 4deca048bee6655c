"""Criteria that need gradients: gathered once in every optimizer step, scored at every event.

Shape suffixes: ``_G`` groups, ``_M`` gradients kept, ``_W`` any weight.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pruningawaretraining.criteria.base import Statistics
from pruningawaretraining.criteria.gradient_collectors import (
    SCORE,
    SEEN,
    STEPS,
    GradientCollector,
    GradientRule,
    MaskGradientCollector,
)
from pruningawaretraining.groups.grouping import Grouping, Member
from pruningawaretraining.groups.reductions import Reduction, device_of, reduce_sum
from pruningawaretraining.registry import lookup, register

log = logging.getLogger(__name__)


@register("criterion", "weight", "abs")
@dataclass(frozen=True)
class Weight:
    """``|w|^p`` reduced over the group, layers not made comparable.

    Args:
        p: the power, above 0.
        reduction: "mean", "sum" or "max" over the group.
        half: scores in bfloat16.
    """

    by_parts: ClassVar[bool] = True

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
    """What the gradient criteria share.

    A group none of whose weights has ever had a gradient (a frozen layer) scores infinity: it goes last. Before the
    first gradient of all, weights are ranked by their size.

    Args:
        momentum: how much of the score stays at the next step: 0 for the last step alone, 1 for the sum of all.
        reduction: "mean", "sum" or "max" over the group.
        half: scores in bfloat16.
    """

    by_parts: ClassVar[bool] = True

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
            log.warning("%s: no gradient has been seen yet; weights are ranked by size", type(self).__name__)
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
    log.info("no gradient ever reached %s; they are pruned last", ", ".join(dict.fromkeys(unseen)))

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


@register("criterion", "retrain_free")
@dataclass(frozen=True)
class RetrainFree:
    """``sum of (dL/dm)^2`` over batches with fixed weights, then a rearrangement (Kwon et al. 2022).

    Args:
        samples: gradients that are kept for the rearrangement (the last ones).
        rearranged: exchange groups within each layer so that the gradients of those that go cancel out.
        most: with more groups than this nothing is rearranged.
    """

    by_parts: ClassVar[bool] = True

    samples: int = 64
    rearranged: bool = True
    most: int = 65536

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples: {self.samples!r} must be 1 or more")

    def collector(self) -> MaskGradientCollector:
        """A new collector."""
        return MaskGradientCollector(self.samples, self.most if self.rearranged else 0)

    def score(self, grouping: Grouping, statistics: Statistics) -> Tensor:
        """See :class:`~pruningawaretraining.criteria.base.Criterion`."""
        if "mask_gradient_squares" not in statistics.tensors:
            log.warning("retrain_free: no gradient has been seen yet; weights are ranked by size")
            return Weight(reduction="sum").score(grouping, statistics)
        return statistics.tensors["mask_gradient_squares"].to(device_of(grouping))

    def refine(self, grouping: Grouping, keep_G: Tensor, statistics: Statistics) -> Tensor:
        """The masks after rearrangement, with as many groups of each set as before."""
        kept_MG = statistics.tensors.get("mask_gradients")
        if kept_MG is None:
            return keep_G
        out_G = keep_G.clone().cpu()
        for one in grouping.sets:
            inside = slice(one.start, one.stop)
            out_G[inside] = rearrange(out_G[inside], kept_MG[:, inside].cpu())
        return out_G.to(keep_G.device)


def rearrange(keep_G: Tensor, gradients_MG: Tensor) -> Tensor:
    """Choose again which groups go, as many as before (Kwon et al. 2022, mask rearrangement).

    From the set with the least ``sum of g^2``: add each other group in ascending order, and drop the one whose removal
    leaves the smallest squared norm of the summed gradients of the rest.

    Args:
        keep_G: masks, True = keep.
        gradients_MG: gradients with respect to the masks, one row for each batch.
    """
    count = int((~keep_G).sum())
    if count in (0, len(keep_G)) or len(gradients_MG) == 0:
        return keep_G
    gradient_GM = gradients_MG.double().T.contiguous()
    squares_G = gradient_GM.square().sum(1)
    order = torch.argsort(squares_G, stable=True)
    going, total_M = order[:count].clone(), gradient_GM[order[:count]].sum(0)
    room = torch.cat([going, going[:1]])
    for candidate in order[count:]:
        room[-1] = candidate
        total_M = total_M + gradient_GM[candidate]
        left = squares_G[room] - 2 * (gradient_GM[room] @ total_M)  # up to |total|^2, the same for all
        worst = int(left.argmin())
        total_M = total_M - gradient_GM[room[worst]]
        room[worst:-1] = room[worst + 1 :].clone()
    out_G = torch.ones_like(keep_G)
    out_G[room[:-1]] = False
    return out_G
