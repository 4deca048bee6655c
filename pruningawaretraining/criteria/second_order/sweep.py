"""The column sweep of SparseGPT, which FastCAP shares: prune column by column, and push the error to the columns right.

Shape suffixes: ``_R`` rows, ``_D`` columns, ``_C`` columns of a chunk, ``_T`` tiles of a chunk, in rows and columns.

The rows of a layer share one Hessian, so that nothing of the size of a row times a square is ever made; every layer is
pruned to the same sparsity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pruningawaretraining.criteria.second_order.fisher import decoupled_, factor
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
    """How many tiles have gone, so that the count is exact at the end of a layer.

    Args:
        fraction: of the tiles.
    """

    def __init__(self, fraction: float) -> None:
        self.fraction, self.seen, self.gone = fraction, 0, 0

    def next(self, tiles: int) -> int:
        """Tiles that go from the next ``tiles``."""
        self.seen += tiles
        number = max(0, min(math.floor(self.fraction * self.seen + SLACK) - self.gone, tiles))
        self.gone += number
        return number


def damped(hessian_DD: Tensor, damp: float) -> Tensor:
    """The Hessian in float64 with ``damp`` times its mean diagonal added; the identity if it is all zero."""
    square = hessian_DD.double().clone()
    mean = float(square.diagonal().mean())
    square.diagonal().add_(damp * mean if mean > 0 else 1.0)
    return square


def sweep(
    matrix_RD: Tensor, hessian_DD: Tensor, alive_RD: Tensor, valid_RD: Tensor, grid: Grid, quota: Quota
) -> tuple[Tensor, Tensor]:
    """Prune a fraction of a matrix's tiles and let the rest adapt (SparseGPT, Frantar and Alistarh 2023).

    Args:
        matrix_RD: the weights; rows share the Hessian.
        hessian_DD: curvature over the columns, damped, positive definite, float64.
        alive_RD: entries that are not masked already.
        valid_RD: entries that are not padding.
        grid: what goes together.
        quota: how many of the valid tiles go in all, those that are masked counted. Not asked for N:M.

    Returns:
        The new weights in float64, exactly 0 where pruned, and the keep mask.
    """
    # A column that is padding in every row (or has never seen an input) must not carry error.
    square = decoupled_(hessian_DD[None].clone(), valid_RD.any(0)[None])
    inverse = torch.cholesky_inverse(factor(square, 0.0))
    upper_DD = factor(inverse, 0.0)[0].mT.contiguous()
    work_RD = matrix_RD.double() * alive_RD
    keep_RD = alive_RD.clone()
    for start in range(0, matrix_RD.shape[1], grid.chunk):
        columns = slice(start, min(start + grid.chunk, matrix_RD.shape[1]))
        scores_RC = (work_RD[:, columns] / upper_DD.diagonal()[columns]).square()
        keep_RD[:, columns] = _choose(scores_RC, alive_RD[:, columns], valid_RD[:, columns], grid, quota)
        errors_RC = _sweep_chunk(work_RD, upper_DD, keep_RD, columns)
        work_RD[:, columns.stop :] -= errors_RC @ upper_DD[columns, columns.stop :]
    return torch.where(keep_RD, work_RD, 0.0), keep_RD


def _sweep_chunk(work_RD: Tensor, upper_DD: Tensor, keep_RD: Tensor, columns: slice) -> Tensor:
    """Prune the columns of a chunk one by one, in place; returns what each pushes to the right."""
    local_RC, upper_CC = work_RD[:, columns], upper_DD[columns, columns]
    errors_RC = torch.zeros_like(local_RC)
    for column in range(local_RC.shape[1]):
        lost_R = torch.where(keep_RD[:, columns.start + column], 0.0, local_RC[:, column])
        errors_RC[:, column] = lost_R / upper_CC[column, column]
        local_RC[:, column:] -= errors_RC[:, column, None] * upper_CC[column, column:]
    return errors_RC


def _choose(scores_RC: Tensor, alive_RC: Tensor, valid_RC: Tensor, grid: Grid, quota: Quota) -> Tensor:
    """Keep mask of a chunk."""
    if grid.of:
        return _choose_n_of_m(scores_RC, alive_RC, grid)
    scores_TT = _tiled(scores_RC, grid).sum((1, 3))
    alive_TT, valid_TT = (_tiled(mask, grid).any(3).any(1) for mask in (alive_RC, valid_RC))
    order_N = torch.where(alive_TT, scores_TT, -torch.inf)  # what has gone is chosen first
    order_N = torch.where(valid_TT, order_N, torch.inf).flatten()
    number = quota.next(int(valid_TT.sum()))
    drop_N = torch.zeros_like(order_N, dtype=torch.bool)
    drop_N[torch.argsort(order_N, stable=True)[:number]] = True
    keep_TT = ~drop_N.reshape(valid_TT.shape)
    spread = keep_TT.repeat_interleave(grid.rows, 0).repeat_interleave(grid.cols, 1)
    return spread & alive_RC


def _tiled(values_RC: Tensor, grid: Grid) -> Tensor:
    rows, cols = values_RC.shape
    return values_RC.reshape(rows // grid.rows, grid.rows, cols // grid.cols, grid.cols)


def _choose_n_of_m(scores_RC: Tensor, alive_RC: Tensor, grid: Grid) -> Tensor:
    order = torch.where(alive_RC, scores_RC, -torch.inf)
    drop = torch.argsort(order, dim=1, stable=True)[:, : scores_RC.shape[1] - grid.keep]
    return torch.ones_like(alive_RC).scatter_(1, drop, False) & alive_RC


def shared_fisher(squares_DD: Tensor, gradients: int) -> Tensor:
    """FastCAP's Fisher: ``(2 / k) sum g g'`` over k gradient blocks."""
    if gradients < 1:
        raise ConfigError("num_grads: no gradient was gathered")
    return squares_DD.double() * (2.0 / gradients)
