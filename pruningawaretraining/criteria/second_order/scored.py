"""Any other criterion in one shot: scores decide, and nothing is compensated.

Shape suffixes: ``_W`` the shape of a weight, ``_B`` blocks, ``_D`` entries of a block, ``_T`` tiles of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruningawaretraining.criteria.base import Criterion, scores_of
from pruningawaretraining.criteria.second_order.gathering import gathered
from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.criteria.second_order.layout import WeightPattern
from pruningawaretraining.criteria.second_order.methods import independent_ranking
from pruningawaretraining.criteria.second_order.solve import Choose, Results, Table, choose_tiles, pruned
from pruningawaretraining.criteria.second_order.weights import PrunableWeight
from pruningawaretraining.patterns.block import Unstructured


@dataclass(eq=False)
class ScoredSolver:
    """Prunes by the scores of any criterion.

    Args:
        weights: what to prune.
        criterion: what scores it.
        pattern: what goes together.
        calibration: the model, and data for criteria that listen to it.
        choose: how sparsity is shared out.
    """

    weights: Sequence[PrunableWeight]
    criterion: Criterion
    pattern: WeightPattern
    calibration: Calibration
    choose: Choose

    def solve(self, fractions: Sequence[float]) -> Results:
        """The weights at each sparsity."""
        scores = self._scores()
        tables = [self._table(weight, scores[weight.name]) for weight in self.weights]
        results: Results = {}
        for fraction in fractions:
            chosen = choose_tiles(self.weights, tables, self.choose, fraction)
            pairs = zip(self.weights, chosen, strict=True)
            results[fraction] = {weight.name: pruned(weight, weight.blocks(), prune_BT) for weight, prune_BT in pairs}
        return results

    def _scores(self) -> dict[str, Tensor]:
        """Layer -> scores that can be expanded to its weight's shape."""
        # N:M is scored weight by weight: what it may not prune is seen to by the ranking.
        pattern = Unstructured() if self.weights[0].layout.group == 1 else self.pattern
        names = [weight.name for weight in self.weights]
        grouping, statistics = gathered(self.calibration, lambda model: pattern.build(model, names), self.criterion)
        scores_G = scores_of(self.criterion, grouping, statistics).float()
        return {member.name.removesuffix(".weight"): spread for member, spread in grouping.expand(scores_G)}

    def _table(self, weight: PrunableWeight, spread: Tensor) -> Table:
        values_BD = weight.layout.to_blocks(spread.to(weight.device).expand(weight.layout.shape).contiguous())
        scores_BT = first_of_tiles(values_BD, weight.layout.valid(weight.device), weight.layout.group)
        ranking = independent_ranking(scores_BT, weight.open_BT, weight.layout)
        return Table(ranking.scores_BS, ranking.tiles_BS)


def first_of_tiles(values_BD: Tensor, valid_BD: Tensor, group: int) -> Tensor:
    """The value of each tile, from its first entry that is not padding."""
    tiled, valid = (one.reshape(one.shape[0], -1, group) for one in (values_BD, valid_BD))
    first = torch.argmax(valid.byte(), dim=-1, keepdim=True)
    return tiled.gather(-1, first)[..., 0]
