"""Retraining-free pruning: squared gradients of masks, then a rearrangement that counts what pairs of groups share.

Shape suffixes: ``_G`` groups, ``_M`` gradients kept.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pruningawaretraining.criteria.base import Needs, Statistics
from pruningawaretraining.criteria.gradient import Weight
from pruningawaretraining.criteria.gradient_collectors import (
    MaskGradientCollector,
)
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.groups.reductions import device_of
from pruningawaretraining.registry import register

logger = logging.getLogger(__name__)


@register("criterion", "retrain_free")
@dataclass(frozen=True)
class RetrainFree:
    """``sum of (dL/dm)^2`` over batches with fixed weights, then a rearrangement (Kwon et al. 2022).

    Args:
        samples: gradients that are kept for the rearrangement (the last ones).
        rearranged: exchange groups within each layer so that the gradients of those that go cancel out.
        most: with more groups than this nothing is rearranged.
    """

    needs: ClassVar[Needs] = Needs(whole_layers=False)

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
            logger.warning("retrain_free: no gradient has been seen yet; weights are ranked by size")
            return Weight(reduction="sum").score(grouping, statistics)
        return statistics.tensors["mask_gradient_squares"].to(device_of(grouping))

    def refine(self, grouping: Grouping, keep_G: Tensor, statistics: Statistics) -> Tensor:
        """The masks after rearrangement, with as many groups of each set as before; those that were masked before the
        event (``statistics.keep_G``) stay masked."""
        kept_MG = statistics.tensors.get("mask_gradients")
        if kept_MG is None:
            return keep_G
        out_G = keep_G.clone().cpu()
        open_G = torch.ones_like(out_G) if statistics.keep_G is None else statistics.keep_G.cpu()
        for one in grouping.sets:
            inside = slice(one.start, one.stop)
            out_G[inside] = rearrange(out_G[inside], kept_MG[:, inside].cpu(), open_G[inside])
        return out_G.to(keep_G.device)


def rearrange(keep_G: Tensor, gradients_MG: Tensor, open_G: Tensor | None = None) -> Tensor:
    """Choose again which groups go, as many as before (Kwon et al. 2022, mask rearrangement).

    From the set with the least ``sum of g^2``: add each other group in ascending order, and drop the one whose removal
    leaves the smallest squared norm of the summed gradients of the rest.

    Args:
        keep_G: masks, True = keep.
        gradients_MG: gradients with respect to the masks, one row for each batch.
        open_G: False for groups that go in any case, as they were masked before; None for none.
    """
    open_G = torch.ones_like(keep_G) if open_G is None else open_G
    count = int((~keep_G).sum())
    if count in (0, len(keep_G)) or len(gradients_MG) == 0:
        return keep_G
    gradient_GM = gradients_MG.double().T.contiguous()
    squares_G = gradient_GM.square().sum(1)
    order = torch.argsort(torch.where(open_G, squares_G, -1.0), stable=True)  # those that go in any case come first
    going, total_M = order[:count].clone(), gradient_GM[order[:count]].sum(0)
    room = torch.cat([going, going[:1]])
    for candidate in order[count:]:
        room[-1] = candidate
        total_M = total_M + gradient_GM[candidate]
        left = squares_G[room] - 2 * (gradient_GM[room] @ total_M)  # up to |total|^2, the same for all
        worst = int(torch.where(open_G[room], left, torch.inf).argmin())
        total_M = total_M - gradient_GM[room[worst]]
        room[worst:-1] = room[worst + 1 :].clone()
    out_G = torch.ones_like(keep_G)
    out_G[room[:-1]] = False
    return out_G
