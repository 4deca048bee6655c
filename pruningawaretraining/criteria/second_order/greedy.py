"""OBS scores, and the greedy order of CAP.

Shape suffixes: ``_B`` blocks, ``_D`` entries of a block, ``_T`` tiles of a block, ``_Q`` entries of a tile, ``_S``
steps, ``_R`` runs of N:M.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHRINK = 0.8
"""The working matrices are cut down to what is left as soon as that is less than this fraction of them."""
TINY = 1e-300


def tile_diagonals(inverse_BDD: Tensor, group: int) -> Tensor:
    """The square of each tile on the diagonal: (blocks, tiles, group, group)."""
    blocks, width, _ = inverse_BDD.shape
    tiles = width // group
    tiled = inverse_BDD.view(blocks, tiles, group, tiles, group)
    squares: Tensor = tiled.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    return squares


def tile_solve(squares: Tensor, values: Tensor) -> Tensor:
    """``squares^-1 values`` for tiles of any size: (..., group, group) and (..., group)."""
    if squares.shape[-1] == 1:
        return values / squares[..., 0].clamp(min=TINY)
    return solved(squares, values[..., None])[..., 0]


def solved(squares: Tensor, right: Tensor) -> Tensor:
    """``squares^-1 right``; singular matrices give NaN, and are not looked for."""
    found: Tensor = torch.linalg.solve_ex(squares, right).result
    return found


def obs_scores(weights_BD: Tensor, inverse_BDD: Tensor, group: int = 1) -> Tensor:
    """Increase of the quadratic loss if one tile is removed and the others adapt: ``1/2 w_Q' (H_QQ)^-1 w_Q``.

    For single weights that is ``w^2 / (2 H_qq)``, with H the inverse Fisher (Hassibi and Stork 1993; Kurtic et al.
    2022).

    Args:
        weights_BD: weights, in the dtype of the inverse.
        inverse_BDD: H.
        group: entries of a tile.

    Returns:
        (blocks, tiles).
    """
    tiled = weights_BD.reshape(weights_BD.shape[0], -1, group)
    return (tiled * tile_solve(tile_diagonals(inverse_BDD, group), tiled)).sum(-1) / 2


def obs_update(weights_BD: Tensor, inverse_BDD: Tensor, prune_BT: Tensor, group: int = 1) -> Tensor:
    """OBS's own update: every pruned tile's correction as if it went alone, summed; then zero.

    ``w - H (E_Q (H_QQ)^-1 w_Q summed over pruned Q)``: it ignores correlations among what goes together.
    """
    tiled = weights_BD.reshape(weights_BD.shape[0], -1, group)
    pull = tile_solve(tile_diagonals(inverse_BDD, group), tiled) * prune_BT[..., None]
    changed = weights_BD - (inverse_BDD @ pull.reshape(weights_BD.shape)[..., None])[..., 0]
    return torch.where(prune_BT.repeat_interleave(group, -1), 0.0, changed)


@dataclass(frozen=True)
class Order:
    """Order of removal of the tiles of each block.

    Args:
        tiles_BS: the tile that goes at each step (int64).
        losses_BS: what that adds to the loss, given all that went before; infinite where nothing eligible is left.
    """

    tiles_BS: Tensor
    losses_BS: Tensor


@dataclass
class _Work:
    """The remainder of each block: weights, inverse, and tile numbers."""

    weights_BD: Tensor
    inverse_BDD: Tensor
    tiles_BT: Tensor
    open_BT: Tensor
    gone_BT: Tensor
    gone: int = 0

    @property
    def left(self) -> int:
        """Tiles that are left: as many in every block."""
        return self.tiles_BT.shape[1] - self.gone

    def shrink(self, group: int) -> None:
        """Drop removed tiles; their number is the same in every block."""
        blocks = self.tiles_BT.shape[0]
        keep_BT = torch.argsort(self.gone_BT.byte(), dim=1, stable=True)[:, : self.left]
        offsets = torch.arange(group, device=keep_BT.device)
        keep_BD = (keep_BT[..., None] * group + offsets).reshape(blocks, -1)
        width = keep_BD.shape[1]
        rows = self.inverse_BDD.gather(1, keep_BD[:, :, None].expand(-1, -1, self.inverse_BDD.shape[2]))
        self.inverse_BDD = rows.gather(2, keep_BD[:, None, :].expand(-1, width, -1))
        self.weights_BD = self.weights_BD.gather(1, keep_BD)
        self.tiles_BT, self.open_BT = self.tiles_BT.gather(1, keep_BT), self.open_BT.gather(1, keep_BT)
        self.gone_BT, self.gone = torch.zeros_like(self.open_BT), 0


def greedy_order(
    weights_BD: Tensor, inverse_BDD: Tensor, open_BT: Tensor, group: int = 1, run: int = 0, most: int = 0
) -> Order:
    """CAP's order: remove the cheapest tile, let the rest of its block adapt, and again.

    ``p = argmin 1/2 w_p' (H_pp)^-1 w_p``, then ``w -= H_{:,p} (H_pp)^-1 w_p`` and ``H -= H_{:,p} (H_pp)^-1 H_{p,:}``
    (Kuznedelev et al. 2023). Only the order and the losses are kept: the weights follow from the set that is pruned.

    Args:
        weights_BD: weights in float64; overwritten.
        inverse_BDD: H in float64, dead entries decoupled; overwritten.
        open_BT: tiles that may go.
        group: entries of a tile.
        run, most: of every ``run`` consecutive tiles at most ``most`` go (N:M); 0 for no limit.

    Returns:
        The order. With a limit it ends where every run is full.
    """
    tiles = open_BT.shape[1]
    runs = tiles // run if run else 0
    budget_BR = _budgets(open_BT, run, most)
    if budget_BR is not None:
        open_BT = open_BT & (budget_BR > 0).repeat_interleave(run, 1)
    steps = tiles if not run else runs * most
    tiles_BT = torch.arange(tiles, device=open_BT.device).expand(open_BT.shape)
    work = _Work(weights_BD, inverse_BDD, tiles_BT, open_BT.clone(), torch.zeros_like(open_BT))
    order, losses = [], []
    for step in range(steps):
        score_BT = _scores(work, group)
        loss_B, pick_B = score_BT.min(1)
        order.append(work.tiles_BT.gather(1, pick_B[:, None])[:, 0])
        losses.append(torch.where(work.open_BT.gather(1, pick_B[:, None])[:, 0], loss_B, torch.inf))
        _remove(work, pick_B, group)
        if budget_BR is not None:
            _close_full_runs(work, budget_BR, order[-1] // run, run)
        if step + 1 < steps and work.left < SHRINK * work.tiles_BT.shape[1]:
            work.shrink(group)
    return Order(torch.stack(order, 1), torch.stack(losses, 1))


def _budgets(open_BT: Tensor, run: int, most: int) -> Tensor | None:
    """Number of tiles that each run may still lose; pruned ones count."""
    if not run:
        return None
    dead_BR = run - open_BT.reshape(open_BT.shape[0], -1, run).sum(-1)
    return (most - dead_BR).clamp(min=0)


def _scores(work: _Work, group: int) -> Tensor:
    """Scores of the remaining tiles; closed tiles come after all open ones, removed ones never."""
    score_BT = obs_scores(work.weights_BD, _with_identity(work, group), group)
    score_BT = torch.where(work.open_BT, score_BT, torch.finfo(score_BT.dtype).max)
    return score_BT.masked_fill_(work.gone_BT, torch.inf)


def _with_identity(work: _Work, group: int) -> Tensor:
    """H; removed tiles of several entries are replaced by the identity, so that H stays solvable."""
    if group > 1 and work.gone:
        diagonal = work.inverse_BDD.diagonal(dim1=-2, dim2=-1)
        diagonal.copy_(torch.where(work.gone_BT.repeat_interleave(group, -1), 1.0, diagonal))
    return work.inverse_BDD


def _remove(work: _Work, pick_B: Tensor, group: int) -> None:
    """Take one tile out of every block; the rest adapts."""
    index_BQ = pick_B[:, None] * group + torch.arange(group, device=pick_B.device)
    blocks, width = work.weights_BD.shape
    offsets = torch.arange(blocks, device=pick_B.device)[:, None] * width
    rows_BQD = work.inverse_BDD.reshape(-1, width)[(offsets + index_BQ).flatten()].view(blocks, group, width)
    own_BQQ = rows_BQD.gather(2, index_BQ[:, None, :].expand(-1, group, -1))
    scaled_BQD = rows_BQD / own_BQQ.clamp(min=TINY) if group == 1 else solved(own_BQQ, rows_BQD)
    removed_BQ = work.weights_BD.gather(1, index_BQ)
    work.weights_BD = work.weights_BD - (scaled_BQD * removed_BQ[..., None]).sum(1)
    work.weights_BD.scatter_(1, index_BQ, 0.0)
    work.inverse_BDD.baddbmm_(rows_BQD.mT, scaled_BQD, alpha=-1)
    work.gone_BT.scatter_(1, pick_B[:, None], True)
    work.gone += 1


def _close_full_runs(work: _Work, budget_BR: Tensor, full_B: Tensor, run: int) -> None:
    """Count the removed tile (from run ``full_B`` of each block), and close full runs."""
    was_open = budget_BR.gather(1, full_B[:, None]) > 0
    budget_BR.scatter_add_(1, full_B[:, None], -was_open.to(budget_BR.dtype))
    work.open_BT &= budget_BR.gather(1, work.tiles_BT // run) > 0
