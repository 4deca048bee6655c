"""The blocked empirical Fisher matrix, and the linear algebra on it.

Shape suffixes: ``_B`` blocks, ``_D`` entries of a block (``_DD`` a square), ``_M`` gradients.

``F_b = damp I + 1/m sum g g'`` for every block b of a weight, over m gradients. Gradients are gathered in chunks, and a
chunk is added by one batched product; nothing is inverted before all are there. Stored are the Gram matrices
(blocks, width, width), or the gradients themselves when there are fewer than the block is wide; either is turned into
what is asked for a few blocks at a time, in float64.

Entries that are masked or padding ("dead") are decoupled: their rows and columns are those of the identity.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pruningawaretraining.errors import ConfigError, ModelError

logger = logging.getLogger(__name__)

WORKSPACE, WORKSPACE_ELSEWHERE = 32 * 2**20, 512 * 2**20
"""Bytes of float64 squares that are worked on at once, on the CPU and on other devices (where launching many small
kernels costs time), unless ``blocks_in_parallel`` says otherwise."""
SQUARES = 4
"""Squares that are alive at once in the worst case (matrix, factor, inverse, and one in the making)."""
RETRIES = 8


def workplace(device: torch.device) -> torch.device:
    """Where the curvature of weights on a device is worked on: there, or on the CPU where it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


@dataclass(frozen=True)
class Storage:
    """Where the statistics of a layer live.

    Args:
        device: of the squares and gradients; None for that of the weights (see :meth:`beside`).
        folder: a folder to spool them to (``traces_backup_dir``); None to keep them in memory.
        dtype: of what is stored; factors are float64 whatever it is.
    """

    device: torch.device | None = None
    folder: Path | None = None
    dtype: torch.dtype = torch.float32

    def beside(self, device: torch.device) -> Storage:
        """The same with a device: if none was asked for, that of the weights."""
        return self if self.device is not None else replace(self, device=workplace(device))

    def zeros(self, *shape: int) -> Tensor:
        """A tensor of zeros, in memory or in a file that is deleted with the tensor.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        if self.folder is None:
            return torch.zeros(shape, device=self.device, dtype=self.dtype)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix="fisher-") as file:
                # The mapping stays valid after the file is unlinked, so that no file is left behind.
                size = math.prod(shape)
                return torch.from_file(file.name, shared=True, size=size, dtype=self.dtype).reshape(shape)
        except OSError as error:
            raise ConfigError(f"traces_backup_dir: {str(self.folder)!r} cannot be written to: {error}") from error


class Fisher(Protocol):
    """The Fisher blocks of one weight (or a run of them)."""

    count: int
    """Gradients in it: what the sum is divided by."""

    def add(self, chunk_BMD: Tensor) -> None:
        """Add gradients."""

    def squares(self, part: slice, alive_BD: Tensor) -> Tensor:
        """The blocks of a part as float64 matrices (b, width, width), dead entries decoupled."""

    def inverses(self, part: slice, alive_BD: Tensor) -> Tensor:
        """Their inverses."""

    def joint_update(self, part: slice, weights_BD: Tensor, prune_BD: Tensor, alive_BD: Tensor) -> Tensor:
        """See :func:`joint_update`."""


class GramFisher:
    """Fisher blocks as Gram matrices: for at least as many gradients as a block is wide.

    Args:
        blocks, width: how many, and how wide.
        damp: added to the diagonal.
        storage: where they live.
    """

    def __init__(self, blocks: int, width: int, damp: float, storage: Storage = Storage()) -> None:
        self.gram_BDD = storage.zeros(blocks, width, width)
        self.damp = damp
        self.count = 0

    def add(self, chunk_BMD: Tensor) -> None:
        """Add gradients (blocks, gradients, width)."""
        chunk_BMD = chunk_BMD.to(self.gram_BDD)
        self.gram_BDD.baddbmm_(chunk_BMD.mT, chunk_BMD)
        self.count += chunk_BMD.shape[1]

    def squares(self, part: slice, alive_BD: Tensor) -> Tensor:
        square = self.gram_BDD[part].to(alive_BD.device, torch.float64, copy=True).div_(max(self.count, 1))
        square.diagonal(dim1=-2, dim2=-1).add_(self.damp)
        return decoupled_(square, alive_BD)

    def inverses(self, part: slice, alive_BD: Tensor) -> Tensor:
        return inverse_of(factor(self.squares(part, alive_BD), self.damp))

    def joint_update(self, part: slice, weights_BD: Tensor, prune_BD: Tensor, alive_BD: Tensor) -> Tensor:
        return joint_update(self.squares(part, alive_BD), weights_BD, prune_BD, self.damp)


class LowRankFisher:
    """Fisher blocks as the gradients themselves: for fewer gradients than a block is wide (Woodbury).

    Args:
        blocks, width: how many, and how wide.
        damp: added to the diagonal.
        most: how many gradients there will be at most.
        storage: where they live.
    """

    def __init__(self, blocks: int, width: int, damp: float, most: int, storage: Storage = Storage()) -> None:
        self.rows_BMD = storage.zeros(blocks, most, width)
        self.damp = damp
        self.count = self.used = 0

    def add(self, chunk_BMD: Tensor) -> None:
        """Add gradients (blocks, gradients, width)."""
        self.rows_BMD[:, self.used : self.used + chunk_BMD.shape[1]].copy_(chunk_BMD)
        self.used += chunk_BMD.shape[1]
        self.count += chunk_BMD.shape[1]

    def _scaled(self, part: slice, alive_BD: Tensor) -> Tensor:
        """Gradients divided by sqrt(m), in float64, dead entries 0."""
        rows = self.rows_BMD[part, : self.used].to(alive_BD.device, torch.float64, copy=True)
        return rows.mul_(alive_BD[:, None, :]).div_(math.sqrt(max(self.count, 1)))

    def squares(self, part: slice, alive_BD: Tensor) -> Tensor:
        rows = self._scaled(part, alive_BD)
        square = rows.mT @ rows
        square.diagonal(dim1=-2, dim2=-1).add_(self.damp)
        return decoupled_(square, alive_BD)

    def inverses(self, part: slice, alive_BD: Tensor) -> Tensor:
        """``1/damp (I - G' (damp I + G G')^-1 G)`` with G the gradients over sqrt(m)."""
        rows = self._scaled(part, alive_BD)
        half = torch.linalg.solve_triangular(self._small_factor(rows), rows, upper=False)
        inverse = torch.baddbmm(
            torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device), half.mT, half, alpha=-1
        ).div_(self.damp)
        return decoupled_(inverse, alive_BD)

    def joint_update(self, part: slice, weights_BD: Tensor, prune_BD: Tensor, alive_BD: Tensor) -> Tensor:
        """With P pruned and K kept: ``w_K + G_K' (damp I + G_K G_K')^-1 G_P w_P``, by the push-through identity."""
        rows = self._scaled(part, alive_BD)
        weights = weights_BD.double()
        kept = rows * ~prune_BD[:, None, :]
        lost = rows @ (weights * prune_BD)[..., None]
        change = kept.mT @ torch.cholesky_solve(lost, self._small_factor(kept))
        return torch.where(prune_BD, 0.0, weights + change[..., 0])

    def _small_factor(self, rows: Tensor) -> Tensor:
        small = rows @ rows.mT
        small.diagonal(dim1=-2, dim2=-1).add_(self.damp)
        return factor(small, self.damp)


def make_fisher(blocks: int, width: int, damp: float, num_grads: int, storage: Storage = Storage()) -> Fisher:
    """The smaller of the two forms."""
    if num_grads < width:
        return LowRankFisher(blocks, width, damp, num_grads, storage)
    return GramFisher(blocks, width, damp, storage)


def stored_bytes(blocks: int, width: int, num_grads: int) -> int:
    """Bytes that :func:`make_fisher` allocates."""
    return 4 * blocks * width * min(width, num_grads)


def decoupled_(square_BDD: Tensor, alive_BD: Tensor) -> Tensor:
    """Make the rows and columns of dead entries those of the identity, in place."""
    if alive_BD.device.type == "cpu" and bool(alive_BD.all()):  # elsewhere asking costs more than doing it
        return square_BDD
    square_BDD.mul_(alive_BD[:, :, None]).mul_(alive_BD[:, None, :])
    square_BDD.diagonal(dim1=-2, dim2=-1).add_(~alive_BD)
    return square_BDD


def factor(square_BDD: Tensor, damp: float) -> Tensor:
    """Lower Cholesky factors. A block that is not positive definite, which rounding can cause when the dampening is
    below a millionth of a millionth of its diagonal, is dampened ten times more, and that is said.

    Raises:
        ModelError: a block holds infinities or NaN, or stays indefinite.
    """
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(square_BDD)
    if not bool(info.any()):
        return lower
    bad = torch.nonzero(info).flatten()
    if not bool(torch.isfinite(square_BDD[bad]).all()):
        raise ModelError("fisher: the gradients are not finite; check the loss and the learning rate before pruning")
    extra = max(damp, 1e-14 * float(square_BDD[bad].diagonal(dim1=-2, dim2=-1).amax()))
    for _ in range(RETRIES):
        extra *= 10
        raised = square_BDD[bad].clone()
        raised.diagonal(dim1=-2, dim2=-1).add_(extra)
        again, info = torch.linalg.cholesky_ex(raised)
        if not bool(info.any()):
            logger.warning("fisher: %d blocks were not positive definite; dampened by %.1g instead", len(bad), extra)
            lower[bad] = again
            return lower
    raise ModelError(f"damp: {damp!r} leaves {len(bad)} Fisher blocks indefinite; raise it")


def inverse_of(lower_BDD: Tensor) -> Tensor:
    """``(L L')^-1``, batched; off the CPU only the triangular solve has a batched kernel."""
    if lower_BDD.device.type == "cpu" or len(lower_BDD) == 1:
        return torch.cholesky_inverse(lower_BDD)
    return inverse_by_triangles(lower_BDD)


def inverse_by_triangles(lower_BDD: Tensor) -> Tensor:
    """``(L L')^-1`` by one triangular solve of many."""
    identity_DD = torch.eye(lower_BDD.shape[-1], dtype=lower_BDD.dtype, device=lower_BDD.device)
    root_BDD: Tensor = torch.linalg.solve_triangular(lower_BDD, identity_DD.expand_as(lower_BDD), upper=False)
    return root_BDD.mT @ root_BDD


def joint_update(square_BDD: Tensor, weights_BD: Tensor, prune_BD: Tensor, damp: float = 0.0) -> Tensor:
    """Weights that minimise the quadratic loss with all pruned entries at 0 at once.

    ``w_K + F_KK^-1 F_KP w_P``, which equals ``w - F^-1_{:,P} (F^-1_PP)^-1 w_P`` and needs no inverse.

    Args:
        square_BDD: F in float64, dead entries decoupled; overwritten.
        weights_BD: the weights.
        prune_BD: True where they go.
        damp: for :func:`factor`.

    Returns:
        The new weights, float64, exactly 0 where pruned.
    """
    weights = weights_BD.double()
    lost = (square_BDD @ (weights * prune_BD)[..., None])[..., 0]
    right = torch.where(prune_BD, 0.0, lost)
    lower = factor(decoupled_(square_BDD, ~prune_BD), damp)
    change = torch.cholesky_solve(right[..., None], lower)[..., 0]
    return torch.where(prune_BD, 0.0, weights + change)


def parts(blocks: int, width: int, in_parallel: int | None = None, on_cpu: bool = True) -> Iterator[slice]:
    """Runs of blocks that are worked on at once."""
    room = WORKSPACE if on_cpu else WORKSPACE_ELSEWHERE
    step = in_parallel or max(1, room // (8 * SQUARES * width * width))
    for start in range(0, blocks, step):
        yield slice(start, min(start + step, blocks))
