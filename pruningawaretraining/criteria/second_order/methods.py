"""OBS and CAP on blocks: how tiles are ranked, and how the weights that stay follow.

Shape suffixes: ``_B`` blocks, ``_D`` entries of a block, ``_T`` tiles of a block, ``_R`` runs of N:M, ``_S`` order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pruningawaretraining.criteria.second_order.greedy import greedy_order, obs_scores, obs_update
from pruningawaretraining.criteria.second_order.layout import Layout
from pruningawaretraining.criteria.second_order.solve import FisherBlocks, Ranking, slots
from pruningawaretraining.registry import lookup, register

Compensate = Callable[[FisherBlocks, Tensor], Tensor]
Merge = Callable[[Tensor], Tensor]


@register("compensation", "joint")
def compensate_jointly(blocks: FisherBlocks, prune_BT: Tensor) -> Tensor:
    """The minimum of the quadratic loss with all pruned weights at 0 at once; what a greedy trace ends in."""
    prune_BD = blocks.layout.spread(prune_BT)
    return blocks.fisher.joint_update(blocks.part, blocks.weights_BD, prune_BD, blocks.alive_BD)


@register("compensation", "independent", "obs")
def compensate_independently(blocks: FisherBlocks, prune_BT: Tensor) -> Tensor:
    """The sum of every pruned tile's own correction (OBS, oBERT)."""
    return obs_update(blocks.weights_BD, blocks.inverse(), prune_BT, blocks.layout.group)


@register("compensation", "none")
def compensate_nothing(blocks: FisherBlocks, prune_BT: Tensor) -> Tensor:
    """Leave the other weights unchanged."""
    return torch.where(blocks.layout.spread(prune_BT), 0.0, blocks.weights_BD)


@register("merge", "cumulative")
def merge_cumulative(losses_BS: Tensor) -> Tensor:
    """Score a tile by the total loss of its block after its removal (Kuznedelev et al. 2023)."""
    return losses_BS.cumsum(1)


@register("merge", "running_max")
def merge_running_max(losses_BS: Tensor) -> Tensor:
    """A tile's score is the largest marginal loss up to it: what the next step costs, kept in order."""
    return losses_BS.cummax(1).values


def independent_ranking(scores_BT: Tensor, open_BT: Tensor, layout: Layout) -> Ranking:
    """Tiles that are scored each by itself; in N:M only the lowest M - N of each run may go.

    The candidates of a block are in the order of its tiles, so that ties go to the lower index.
    """
    tile = layout.tile
    tiles_BT = torch.arange(layout.tiles, device=scores_BT.device).expand_as(scores_BT)
    if not tile.of:
        return Ranking(scores_BT.masked_fill(~open_BT, torch.inf), tiles_BT)
    blocks = scores_BT.shape[0]
    # Pruned weights go first within their run, and count among its M - N.
    ranked_BR = scores_BT.masked_fill(~open_BT, -torch.inf).reshape(blocks, -1, tile.of)
    going_BT = lowest_of_each(ranked_BR, tile.of - tile.keep).reshape(blocks, -1)
    places = torch.argsort((~going_BT).byte(), dim=1, stable=True)[:, : slots(layout)]
    scores_BS = scores_BT.masked_fill(~open_BT, torch.inf).gather(1, places)
    return Ranking(scores_BS, places)


def lowest_of_each(scores: Tensor, number: int) -> Tensor:
    """True for the ``number`` lowest of every row (the last dimension); of ties the lower index."""
    first = torch.argsort(scores, dim=-1, stable=True)[..., :number]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, first, True)


@dataclass(frozen=True)
class ObsMethod:
    """Every tile as if it went alone.

    Args:
        compensate: how the others follow.
    """

    compensate: str = "independent"

    def rank(self, blocks: FisherBlocks) -> Ranking:
        scores_BT = obs_scores(blocks.weights_BD, blocks.inverse(), blocks.layout.group)
        return independent_ranking(scores_BT, blocks.open_BT, blocks.layout)

    def update(self, blocks: FisherBlocks, prune_BT: Tensor) -> Tensor:
        compensate: Compensate = lookup("compensation", self.compensate)
        return compensate(blocks, prune_BT)


@dataclass(frozen=True)
class CapMethod:
    """One tile of a block after the other, correlations included.

    Args:
        merge: how the blocks' orders become one.
    """

    merge: str = "running_max"

    def rank(self, blocks: FisherBlocks) -> Ranking:
        tile = blocks.layout.tile
        most = tile.of - tile.keep
        weights_BD = blocks.weights_BD.clone()
        order = greedy_order(weights_BD, blocks.inverse(), blocks.open_BT, blocks.layout.group, tile.of, most)
        merge: Merge = lookup("merge", self.merge)
        return Ranking(merge(order.losses_BS.clamp(min=0)), order.tiles_BS)

    def update(self, blocks: FisherBlocks, prune_BT: Tensor) -> Tensor:
        return compensate_jointly(blocks, prune_BT)
