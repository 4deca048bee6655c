"""FastCAP and SparseGPT: one Hessian a layer, a column sweep, the same sparsity in every layer.

Shape suffixes: ``_W`` the shape of a weight, ``_B`` blocks, ``_D`` columns, ``_R`` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.criteria.second_order.layer_inputs import InputHessians, check_supported, reordered
from pruningawaretraining.criteria.second_order.ranks import Ranks
from pruningawaretraining.criteria.second_order.solve import Pruned, Results
from pruningawaretraining.criteria.second_order.sweep import Grid, Quota, damped, shared_fisher, sweep
from pruningawaretraining.criteria.second_order.weights import PrunableWeight
from pruningawaretraining.errors import ConfigError


@dataclass(eq=False)
class FastCapSolver:
    """One Fisher block for all blocks of a layer, which are the rows of the sweep (Kuznedelev et al. 2023, FastCAP).

    Args:
        weights: what to prune.
        calibration: where gradients come from.
        num_grads: how many.
        damp: added to the diagonal, as a fraction of its mean.
        ranks: this process.
    """

    weights: Sequence[PrunableWeight]
    calibration: Calibration
    num_grads: int
    damp: float
    ranks: Ranks = field(default_factory=Ranks.current)

    def solve(self, fractions: Sequence[float]) -> Results:
        """The weights at each sparsity."""
        hessians = self._hessians()
        results: Results = {fraction: {} for fraction in fractions}
        for number, (weight, hessian_DD) in enumerate(zip(self.weights, hessians, strict=True)):
            tile = weight.layout.tile
            grid = Grid(1, weight.layout.group, tile.keep, tile.of)
            matrix_BD, valid_BD = weight.blocks(), weight.layout.valid()
            for fraction in fractions:
                found = matrix_BD, weight.alive_BD
                if number % self.ranks.world == self.ranks.rank:
                    found = sweep(matrix_BD, hessian_DD, weight.alive_BD, valid_BD, grid, Quota(fraction))
                value_W, keep_W = (weight.layout.from_blocks(one) for one in found)
                results[fraction][weight.name] = _shared(weight, value_W, keep_W, number, self.ranks)
        return results

    def _hessians(self) -> list[Tensor]:
        sums = [torch.zeros(weight.layout.width, weight.layout.width) for weight in self.weights]

        def add(gradients: list[Tensor]) -> None:
            for weight, total_DD, gradient in zip(self.weights, sums, gradients, strict=True):
                blocks_BD = weight.layout.to_blocks(gradient.detach()).float().cpu()
                blocks_BD = blocks_BD if weight.keep_W is None else blocks_BD * weight.alive_BD
                total_DD.addmm_(blocks_BD.mT, blocks_BD)

        parameters = [weight.parameter for weight in self.weights]
        done = self.calibration.each_gradient(parameters, self.ranks.share(self.num_grads), add)
        total = self.ranks.total(done)
        return [
            damped(shared_fisher(self.ranks.sum(one), total * weight.layout.blocks), self.damp)
            for weight, one in zip(self.weights, sums, strict=True)
        ]


@dataclass(eq=False)
class SparseGptSolver:
    """The Hessian of each layer's output error over its inputs; the rows of the sweep are the outputs.

    All layers are measured on the dense model, so that every sparsity comes from one run over the data.

    Args:
        weights: what to prune.
        calibration: where inputs come from.
        num_batches: how many micro-batches.
        damp: added to the diagonal, as a fraction of its mean.
        ranks: this process.
    """

    weights: Sequence[PrunableWeight]
    calibration: Calibration
    num_batches: int
    damp: float
    ranks: Ranks = field(default_factory=Ranks.current)

    def solve(self, fractions: Sequence[float]) -> Results:
        """The weights at each sparsity."""
        for weight in self.weights:
            check_supported(weight.name, weight.module)
        hooks = InputHessians([(weight.name, weight.module) for weight in self.weights])
        try:
            self.calibration.run(self.ranks.share(self.num_batches))
        finally:
            hooks.remove()
        results: Results = {fraction: {} for fraction in fractions}
        for number, weight in enumerate(self.weights):
            hessian_GDD = self.ranks.sum(hooks.hessian(weight.name) / self.ranks.world)
            for fraction in fractions:
                found = weight.parameter.detach(), torch.ones(weight.layout.shape, dtype=torch.bool)
                if number % self.ranks.world == self.ranks.rank:
                    found = self._sweep(weight, hessian_GDD.cpu(), Quota(fraction))
                results[fraction][weight.name] = _shared(weight, *found, number, self.ranks)
        return results

    def _sweep(self, weight: PrunableWeight, hessian_GDD: Tensor, quota: Quota) -> tuple[Tensor, Tensor]:
        layout, tile = weight.layout, weight.layout.tile
        tensors = [
            weight.parameter.detach().double().cpu(),
            layout.from_blocks(weight.alive_BD),
            torch.ones(layout.shape, dtype=torch.bool),
        ]
        groups, kernel = hessian_GDD.shape[0], layout.padded[1]
        if (layout.shape[0] // groups) % tile.rows and groups > 1:
            raise ConfigError(f"pattern.rows: {tile.rows} does not divide the outputs of a group of {weight.name!r}")
        if layout.is_flat:
            matrices = [one.flatten(1) for one in tensors]
        else:
            matrices = [layout.rows_of(one) for one in tensors]
            hessian_GDD = _padded(reordered(hessian_GDD, kernel), layout.shape[1], layout.padded[2], kernel)
        grid = Grid(tile.rows, tile.cols, tile.keep, tile.of)
        per_group = zip(hessian_GDD, *(one.chunk(groups) for one in matrices), strict=True)
        swept = [
            sweep(matrix, damped(hessian_DD, self.damp), alive, valid, grid, quota)
            for hessian_DD, matrix, alive, valid in per_group
        ]
        joined = [torch.cat(one) for one in zip(*swept, strict=True)]
        value, keep = (one.reshape(layout.shape) if layout.is_flat else layout.from_rows(one) for one in joined)
        return value, keep


def _padded(hessian_GDD: Tensor, inputs: int, padded: int, kernel: int) -> Tensor:
    """With zero rows and columns where inputs are padded."""
    groups, extra = hessian_GDD.shape[0], padded - inputs
    if not extra:
        return hessian_GDD
    four = hessian_GDD.reshape(groups, kernel, inputs, kernel, inputs)
    return functional.pad(four, (0, extra, 0, 0, 0, extra)).reshape(groups, kernel * padded, kernel * padded)


def _shared(weight: PrunableWeight, value_W: Tensor, keep_W: Tensor, number: int, ranks: Ranks) -> Pruned:
    """What the layer's owner found, on every rank."""
    owner = number % ranks.world
    value_W = ranks.broadcast(value_W.to(weight.parameter), owner)
    return Pruned(value_W, ranks.broadcast(keep_W.to(torch.uint8), owner).bool())
