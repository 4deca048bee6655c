"""Any other criterion in one shot: scores decide, and nothing is compensated.

Shape suffixes: ``_W`` the shape of a weight, ``_B`` blocks, ``_D`` entries of a block, ``_T`` tiles of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruningawaretraining.criteria.second_order.layout import WeightPattern
from pruningawaretraining.criteria.second_order.methods import independent_ranking
from pruningawaretraining.criteria.second_order.solve import Choose, Results, Table, choose_tiles, pruned
from pruningawaretraining.criteria.second_order.weights import PrunableWeight
from pruningawaretraining.patterns.block import Unstructured
from pruningawaretraining.statistics import Criterion, Statistics


@dataclass(eq=False)
class ScoredSolver:
    """Prunes by a criterion that needs only the weights.

    Args:
        weights: what to prune.
        criterion: what scores it.
        pattern: what goes together.
        model: the model.
        choose: how sparsity is shared out.
    """

    weights: Sequence[PrunableWeight]
    criterion: Criterion
    pattern: WeightPattern
    model: nn.Module
    choose: Choose

    def solve(self, fractions: Sequence[float]) -> Results:
        """The weights at each sparsity."""
        tables = [self._table(weight) for weight in self.weights]
        results: Results = {}
        for fraction in fractions:
            chosen = choose_tiles(self.weights, tables, self.choose, fraction)
            pairs = zip(self.weights, chosen, strict=True)
            results[fraction] = {weight.name: pruned(weight, weight.blocks(), prune_BT) for weight, prune_BT in pairs}
        return results

    def _table(self, weight: PrunableWeight) -> Table:
        single = weight.layout.group == 1  # N:M too: what it may not prune is seen to by the ranking
        pattern = Unstructured() if single else self.pattern
        grouping = pattern.build(self.model, [weight.name])
        scores_G = self.criterion.score(grouping, Statistics()).detach().float().cpu()
        ((_, spread),) = grouping.expand(scores_G)
        values_BD = weight.layout.to_blocks(spread.expand(weight.layout.shape).contiguous())
        scores_BT = first_of_tiles(values_BD, weight.layout.valid(), weight.layout.group)
        ranking = independent_ranking(scores_BT, weight.open_BT, weight.layout)
        return Table(ranking.scores_BS, ranking.tiles_BS)


def first_of_tiles(values_BD: Tensor, valid_BD: Tensor, group: int) -> Tensor:
    """The value of each tile, from its first entry that is not padding."""
    tiled, valid = (one.reshape(one.shape[0], -1, group) for one in (values_BD, valid_BD))
    first = torch.argmax(valid.byte(), dim=-1, keepdim=True)
    return tiled.gather(-1, first)[..., 0]
