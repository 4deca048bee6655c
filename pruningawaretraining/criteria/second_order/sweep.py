"""The column sweep of SparseGPT, which FastCAP shares: prune column by column, and push the error to the columns right.

Shape suffixes: ``_G`` matrices that are swept together, each with a Hessian of its own, ``_R`` rows, ``_D`` columns,
``_C`` columns of a chunk, ``_T`` tiles of a chunk, in rows and columns, ``_N`` the same in a row, ``_S`` chunks.

The rows of a matrix share one Hessian, so that nothing of the size of a row times a square is ever made; every layer is
pruned to the same sparsity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pruningawaretraining.criteria.second_order.fisher import decoupled_, factor, inverse_of
from pruningawaretraining.errors import ConfigError

CHUNK = 128
"""Columns between two choices of what goes (Frantar and Alistarh 2023)."""
SLACK = 1e-6


@dataclass(frozen=True)
class Grid:
    """Tiles on the matrix that is swept.

    Args:
        rows, cols: size of a tile.
        keep, of: at most ``keep`` of ``of`` consecutive columns of a row stay; 0 for no such limit.
    """

    rows: int = 1
    cols: int = 1
    keep: int = 0
    of: int = 0

    @property
    def chunk(self) -> int:
        """Columns of a chunk: whole tiles; a run of N:M is chosen when the sweep gets to it."""
        return self.of if self.of else math.ceil(CHUNK / self.cols) * self.cols


class Quota:
    """Running number of pruned tiles, which makes the count exact at the end of a layer.

    Args:
        fraction: of the tiles.
    """

    def __init__(self, fraction: float) -> None:
        self.fraction, self.seen, self.gone = fraction, 0, 0

    def next(self, tiles: int) -> int:
        """Number of tiles to prune among the next ``tiles``."""
        self.seen += tiles
        number = max(0, min(math.floor(self.fraction * self.seen + SLACK) - self.gone, tiles))
        self.gone += number
        return number


def damped(hessian_DD: Tensor, damp: float) -> Tensor:
    """Hessians (one or many) in float64 with ``damp`` times their mean diagonal added; the identity if that is 0."""
    square = hessian_DD.to(torch.float64, copy=True)
    diagonal = square.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal.add_(torch.where(mean > 0, damp * mean, 1.0))
    return square


def upper_factor(hessian_GDD: Tensor, valid_GRD: Tensor) -> Tensor:
    """U with ``H^-1 = U' U``, of which a sweep takes its corrections; float64. It serves any number of sparsities.

    Args:
        hessian_GDD: curvature over the columns, damped, positive definite, float64.
        valid_GRD: entries that are not padding. A column that is padding in every row must not carry error.
    """
    square_GDD = decoupled_(hessian_GDD.clone(), valid_GRD.any(1))
    return factor(inverse_of(factor(square_GDD, 0.0)), 0.0).mT.contiguous()


def sweep(
    matrix_RD: Tensor, hessian_DD: Tensor, alive_RD: Tensor, valid_RD: Tensor, grid: Grid, quota: Quota
) -> tuple[Tensor, Tensor]:
    """:func:`sweep_by` of one matrix, with its Hessian (damped, positive definite, float64)."""
    upper_GDD = upper_factor(hessian_DD[None], valid_RD[None])
    weights_GRD, keep_GRD = sweep_by(upper_GDD, matrix_RD[None], alive_RD[None], valid_RD[None], grid, quota)
    return weights_GRD[0], keep_GRD[0]


def sweep_by(
    upper_GDD: Tensor, matrix_GRD: Tensor, alive_GRD: Tensor, valid_GRD: Tensor, grid: Grid, quota: Quota
) -> tuple[Tensor, Tensor]:
    """Prune a fraction of matrices' tiles and let the rest adapt (SparseGPT, Frantar and Alistarh 2023).

    Args:
        upper_GDD: of their Hessians, from :func:`upper_factor`.
        matrix_GRD: the weights; the rows of a matrix share its Hessian.
        alive_GRD: entries that are not masked already.
        valid_GRD: entries that are not padding.
        grid: what goes together.
        quota: how many of the valid tiles go in all, those that are masked counted. Not asked for N:M.

    Returns:
        The new weights in float64, exactly 0 where pruned, and the keep mask.
    """
    work_GRD = matrix_GRD.double() * alive_GRD
    keep_GRD = alive_GRD.clone()
    width = work_GRD.shape[2]
    goings_SG = None if grid.of else _goings(valid_GRD, grid, quota)
    for number, start in enumerate(range(0, width, grid.chunk)):
        columns = slice(start, min(start + grid.chunk, width))
        diagonal_GC = upper_GDD.diagonal(dim1=1, dim2=2)[:, columns]
        scores_GRC = (work_GRD[:, :, columns] / diagonal_GC[:, None]).square()
        alive_GRC = alive_GRD[:, :, columns]
        if goings_SG is None:
            keep_GRC = _choose_n_of_m(scores_GRC, alive_GRC, grid)
        else:
            keep_GRC = _choose(scores_GRC, alive_GRC, valid_GRD[:, :, columns], grid, goings_SG[number])
        keep_GRD[:, :, columns] = keep_GRC
        errors_GRC = _sweep_chunk(work_GRD, upper_GDD, keep_GRD, columns)
        if columns.stop < width:
            work_GRD[:, :, columns.stop :] -= errors_GRC @ upper_GDD[:, columns, columns.stop :]
    return torch.where(keep_GRD, work_GRD, 0.0), keep_GRD


def _sweep_chunk(work_GRD: Tensor, upper_GDD: Tensor, keep_GRD: Tensor, columns: slice) -> Tensor:
    """Prune the columns of a chunk one by one, in place; returns what each pushes to the right."""
    local_GRC = work_GRD[:, :, columns]
    diagonal_GC = upper_GDD.diagonal(dim1=1, dim2=2)[:, columns]
    scaled_GCC = upper_GDD[:, columns, columns] / diagonal_GC[:, :, None]
    going_GRC = (~keep_GRD[:, :, columns]).to(work_GRD.dtype)
    lost_GRC = torch.zeros_like(local_GRC)
    for column in range(local_GRC.shape[2]):
        lost_GR1 = lost_GRC[:, :, column : column + 1]
        torch.mul(local_GRC[:, :, column : column + 1], going_GRC[:, :, column : column + 1], out=lost_GR1)
        local_GRC[:, :, column:].addcmul_(lost_GR1, scaled_GCC[:, column, None, column:], value=-1)
    return lost_GRC / diagonal_GC[:, None]


def _goings(valid_GRD: Tensor, grid: Grid, quota: Quota) -> Tensor:
    """How many tiles of each matrix go at each chunk, (chunks, matrices); counted before the sweep, asking once."""
    counts_GT = _tiled(valid_GRD, grid).any(4).any(2).sum(1).cpu()
    counts_GS = torch.stack([one.sum(1) for one in torch.split(counts_GT, grid.chunk // grid.cols, 1)], 1)
    goings_GS = torch.tensor([[quota.next(count) for count in counts] for counts in counts_GS.tolist()], device="cpu")
    return goings_GS.T.contiguous().to(valid_GRD.device, non_blocking=True)


def _choose(scores_GRC: Tensor, alive_GRC: Tensor, valid_GRC: Tensor, grid: Grid, going_G: Tensor) -> Tensor:
    """Keep mask of a chunk."""
    scores_GTT = _tiled(scores_GRC, grid).sum((2, 4))
    alive_GTT, valid_GTT = (_tiled(mask, grid).any(4).any(2) for mask in (alive_GRC, valid_GRC))
    order_GTT = torch.where(alive_GTT, scores_GTT, -torch.inf)  # pruned weights are chosen first
    order_GN = torch.argsort(torch.where(valid_GTT, order_GTT, torch.inf).flatten(1), dim=1, stable=True)
    drop_GN = torch.arange(order_GN.shape[1], device=order_GN.device) < going_G[:, None]
    keep_GTT = ~torch.zeros_like(drop_GN).scatter_(1, order_GN, drop_GN).view(valid_GTT.shape)
    return keep_GTT.repeat_interleave(grid.rows, 1).repeat_interleave(grid.cols, 2) & alive_GRC


def _tiled(values_GRC: Tensor, grid: Grid) -> Tensor:
    matrices, rows, cols = values_GRC.shape
    return values_GRC.reshape(matrices, rows // grid.rows, grid.rows, cols // grid.cols, grid.cols)


def _choose_n_of_m(scores_GRC: Tensor, alive_GRC: Tensor, grid: Grid) -> Tensor:
    order_GRC = torch.where(alive_GRC, scores_GRC, -torch.inf)
    drop = torch.argsort(order_GRC, dim=2, stable=True)[:, :, : scores_GRC.shape[2] - grid.keep]
    return torch.ones_like(alive_GRC).scatter_(2, drop, False) & alive_GRC


def shared_fisher(squares_DD: Tensor, gradients: int) -> Tensor:
    """FastCAP's Fisher: ``(2 / k) sum g g'`` over k gradient blocks."""
    if gradients < 1:
        raise ConfigError("num_grads: no gradient was gathered")
    return squares_DD.double() * (2.0 / gradients)
