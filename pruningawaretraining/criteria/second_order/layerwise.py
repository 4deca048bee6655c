"""FastCAP and SparseGPT: one Hessian a layer, a column sweep, the same sparsity in every layer.

Shape suffixes: ``_W`` the shape of a weight, ``_B`` blocks, ``_G`` groups of a convolution, ``_D`` columns,
``_R`` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.criteria.second_order.layer_inputs import InputHessians, check_supported, reordered
from pruningawaretraining.criteria.second_order.layout import Layout
from pruningawaretraining.criteria.second_order.solve import Pruned, Results
from pruningawaretraining.criteria.second_order.sweep import (
    Grid,
    Quota,
    damped,
    shared_fisher,
    sweep_by,
    upper_factor,
)
from pruningawaretraining.criteria.second_order.weights import PrunableWeight
from pruningawaretraining.distributed.collectives import Ranks
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
            matrix_BD, valid_BD = weight.blocks(), weight.layout.valid(weight.device)
            mine = number % self.ranks.world == self.ranks.rank
            upper_GDD = upper_factor(hessian_DD[None], valid_BD[None]) if mine else hessian_DD
            for fraction in fractions:
                found = matrix_BD, weight.alive_BD
                if mine:
                    matrices = matrix_BD[None], weight.alive_BD[None], valid_BD[None]
                    value_GBD, keep_GBD = sweep_by(upper_GDD, *matrices, grid, Quota(fraction))
                    found = value_GBD[0], keep_GBD[0]
                value_W, keep_W = (weight.layout.from_blocks(one) for one in found)
                results[fraction][weight.name] = _shared(weight, value_W, keep_W, number, self.ranks)
        return results

    def _hessians(self) -> list[Tensor]:
        widths = [(weight.layout.width, weight.device) for weight in self.weights]
        sums = [torch.zeros(width, width, device=device) for width, device in widths]

        def add(gradients: list[Tensor]) -> None:
            for weight, total_DD, gradient in zip(self.weights, sums, gradients, strict=True):
                blocks_BD = weight.layout.to_blocks(gradient.detach()).float().to(weight.device)
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
            hessian_GDD = self.ranks.sum(hooks.hessian(weight.name) / self.ranks.world).to(weight.device)
            mine = number % self.ranks.world == self.ranks.rank
            swept = _Swept.of(weight, hessian_GDD, self.damp) if mine else None
            for fraction in fractions:
                if swept is None:
                    found = weight.parameter.detach(), torch.ones(weight.layout.shape, dtype=torch.bool)
                else:
                    found = swept.at(fraction)
                results[fraction][weight.name] = _shared(weight, *found, number, self.ranks)
        return results


@dataclass(frozen=True, eq=False)
class _Swept:
    """A layer's weights as the matrices that are swept: one for each group of a convolution.

    Args:
        layout: of the weight.
        upper_GDD: factors of their Hessians.
        matrix_GRD, alive_GRD, valid_GRD: see :func:`~.sweep.sweep_by`.
    """

    layout: Layout
    upper_GDD: Tensor
    matrix_GRD: Tensor
    alive_GRD: Tensor
    valid_GRD: Tensor

    @classmethod
    def of(cls, weight: PrunableWeight, hessian_GDD: Tensor, damp: float) -> _Swept:
        """A weight's, with its groups' Hessians over the inputs, not damped yet."""
        layout, tile = weight.layout, weight.layout.tile
        tensors = [
            weight.parameter.detach().to(weight.device, torch.float64),
            layout.from_blocks(weight.alive_BD),
            torch.ones(layout.shape, dtype=torch.bool, device=weight.device),
        ]
        groups, kernel = hessian_GDD.shape[0], layout.padded[1]
        if (layout.shape[0] // groups) % tile.rows and groups > 1:
            raise ConfigError(f"pattern.rows: {tile.rows} does not divide the outputs of a group of {weight.name!r}")
        if layout.is_flat:
            matrices = [one.flatten(1) for one in tensors]
        else:
            matrices = [layout.rows_of(one) for one in tensors]
            hessian_GDD = _padded(reordered(hessian_GDD, kernel), layout.shape[1], layout.padded[2], kernel)
        in_groups = [one.reshape(groups, -1, one.shape[1]) for one in matrices]
        return cls(layout, upper_factor(damped(hessian_GDD, damp), in_groups[2]), *in_groups)

    def at(self, fraction: float) -> tuple[Tensor, Tensor]:
        """New values and keep mask in the weight's shape."""
        layout, tile = self.layout, self.layout.tile
        grid = Grid(tile.rows, tile.cols, tile.keep, tile.of)
        swept = sweep_by(self.upper_GDD, self.matrix_GRD, self.alive_GRD, self.valid_GRD, grid, Quota(fraction))
        value, keep = (one.flatten(0, 1) for one in swept)
        if layout.is_flat:
            return value.reshape(layout.shape), keep.reshape(layout.shape)
        return layout.from_rows(value), layout.from_rows(keep)


def _padded(hessian_GDD: Tensor, inputs: int, padded: int, kernel: int) -> Tensor:
    """With zero rows and columns where inputs are padded."""
    groups, extra = hessian_GDD.shape[0], padded - inputs
    if not extra:
        return hessian_GDD
    four = hessian_GDD.reshape(groups, kernel, inputs, kernel, inputs)
    return functional.pad(four, (0, extra, 0, 0, 0, extra)).reshape(groups, kernel * padded, kernel * padded)


def _shared(weight: PrunableWeight, value_W: Tensor, keep_W: Tensor, number: int, ranks: Ranks) -> Pruned:
    """The result of the layer's owner, on every rank."""
    owner = number % ranks.world
    value_W = ranks.broadcast(value_W.to(weight.parameter), owner)
    return Pruned(value_W, ranks.broadcast(keep_W.to(torch.uint8), owner).bool())
