"""Greedy order of removal of groups of inputs, cheapest first, with losses: many sets at once, without host syncs.

Shape suffixes: ``_S`` sets of a batch, ``_B`` their readers, ``_N`` groups of a set, ``_Q`` a reader's inputs of one
group, ``_D`` all of these (group by group), ``_O`` its outputs, ``_P`` a pool of groups, ``_X`` a reader's inputs
of a pool, ``_R`` inputs that go, ``_K`` rows that are kept for later, ``_T`` groups that go in a round.

With H the inverse of the covariance of a reader's inputs and W its weights, taking inputs R away costs
``tr(W_R (H_RR)^-1 W_R')``; then ``W -= W_R (H_RR)^-1 H_R`` and ``H -= H_R' (H_RR)^-1 H_R`` (Hassibi and Stork 1993). A
pool of the cheapest groups is settled exactly, group by group, on squares of its own; of whole matrices only what is
asked for is brought up to date, from the factors ``L^-1 H_R`` of all that has gone since they were last cut down.

Which group goes is known to the device alone: what is computed where depends on sizes only, so that nothing waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

POOL = 32
"""The cheapest groups among which the next are found exactly; half of them go before all are looked at again."""
STEPS = POOL // 2
SHRINK = 0.7
"""Matrices are cut down to what is left once that is less than this fraction of them, and not below a pool."""


def removal_losses(square_QQ: Tensor, gram_QQ: Tensor) -> Tensor:
    """``tr(square^-1 gram)`` of many small matrices (..., Q, Q). NaN where a matrix is not positive definite."""
    if square_QQ.shape[-1] == 1:
        return (gram_QQ / square_QQ)[..., 0, 0]
    lower_QQ = torch.linalg.cholesky_ex(square_QQ).L
    identity_QQ = torch.eye(square_QQ.shape[-1], dtype=square_QQ.dtype, device=square_QQ.device)
    root_QQ: Tensor = torch.linalg.solve_triangular(lower_QQ, identity_QQ.expand_as(lower_QQ), upper=False)
    return ((root_QQ @ gram_QQ) * root_QQ).sum((-1, -2))


def _halves(own_RR: Tensor, rows_RD: Tensor) -> tuple[Tensor, Tensor]:
    """``L^-1 rows`` and ``(L L')^-1 rows`` with ``L L' = own``, of one matrix or of many."""
    lower_RR = torch.linalg.cholesky_ex(own_RR).L
    half_RD = torch.linalg.solve_triangular(lower_RR, rows_RD, upper=False)
    return half_RD, torch.linalg.solve_triangular(lower_RR.mT, half_RD, upper=True)


def inputs_of(groups_P: Tensor, size: int) -> Tensor:
    """The inputs of groups (..., P) of ``size`` inputs each: (..., P * size)."""
    return (groups_P[..., None] * size + torch.arange(size, device=groups_P.device)).flatten(-2)


def diagonal_blocks(square_DD: Tensor, size: int) -> Tensor:
    """The squares of ``size`` inputs on the diagonal of (..., D, D): (..., N, size, size), a view."""
    count = square_DD.shape[-1] // size
    tiled = square_DD.view(*square_DD.shape[:-2], count, size, count, size)
    return tiled.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


@dataclass(eq=False)
class IndexedReader:
    """A layer, as far as it reads the groups of one set.

    Args:
        weight_OD: its weights, group by group; overwritten.
        inverse_DD: the inverse of its inputs' covariance, float64.
        size: inputs of a group.
    """

    weight_OD: Tensor
    inverse_DD: Tensor
    size: int
    pending: int = 0

    def __post_init__(self) -> None:
        self.blocks_NQQ = diagonal_blocks(self.inverse_DD, self.size).clone()
        count = len(self.blocks_NQQ)
        going = count if SHRINK * count < POOL + STEPS else count - int(SHRINK * count) + STEPS  # before a cut
        self._rows_KD = self.inverse_DD.new_empty(going * self.size, self.inverse_DD.shape[0])

    def losses(self) -> Tensor:
        """Loss of removing each group alone (groups); NaN for removed groups."""
        weight_NOQ = self.weight_OD.view(len(self.weight_OD), -1, self.size).movedim(0, 1)
        return removal_losses(self.blocks_NQQ, weight_NOQ.mT @ weight_NOQ)

    def pool(self, groups_P: Tensor) -> tuple[Tensor, Tensor]:
        """H and W'W of some groups as they are now; what happens among them needs no others."""
        inputs_X = inputs_of(groups_P, self.size)
        weight_OX = self.weight_OD[:, inputs_X]
        return self._rows(inputs_X, inputs_X), weight_OX.mT @ weight_OX

    def drop(self, groups: Tensor) -> None:
        """Remove groups and refit the others. Removed groups must not be queried again."""
        inputs_R = inputs_of(groups, self.size)
        rows_RD = self._rows(inputs_R, None)
        half_RD, pull_RD = _halves(rows_RD[:, inputs_R], rows_RD)
        self.weight_OD.addmm_(self.weight_OD[:, inputs_R], pull_RD, alpha=-1)
        half_NRQ = half_RD.reshape(len(inputs_R), -1, self.size).movedim(0, 1)
        self.blocks_NQQ.baddbmm_(half_NRQ.mT, half_NRQ, alpha=-1)
        self._rows_KD[self.pending : self.pending + len(inputs_R)] = half_RD
        self.pending += len(inputs_R)

    def shrink(self, left_N: Tensor) -> None:
        """Cut everything down to some groups."""
        inputs_D = inputs_of(left_N, self.size)
        self.inverse_DD, self.weight_OD = self._rows(inputs_D, inputs_D), self.weight_OD[:, inputs_D]
        self.pending = 0
        self.__post_init__()

    def _rows(self, rows_R: Tensor, columns_X: Tensor | None) -> Tensor:
        """Rows of H at some columns (None for all), updated for the removed groups."""
        found, known_KD = self.inverse_DD.index_select(0, rows_R), self._rows_KD[: self.pending]
        across_KX = known_KD if columns_X is None else known_KD.index_select(1, columns_X)
        found = found if columns_X is None else found.index_select(1, columns_X)
        return found.addmm_(known_KD.index_select(1, rows_R).mT, across_KX, alpha=-1)


@dataclass(eq=False)
class ReadSet:
    """The groups of one set and the layers that read them, all with the same number of groups.

    Args:
        readers: the layers.
        count: how many groups there are.
    """

    readers: Sequence[IndexedReader]
    count: int
    left: int = 0
    order: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        device = self.readers[0].inverse_DD.device
        self.left = self.count
        self._names_N = torch.arange(self.count, device=device)
        self._open_N = torch.ones(self.count, dtype=torch.bool, device=device)

    def cheapest(self, most: int) -> tuple[Tensor, Tensor]:
        """The cheapest groups to remove alone, and which of them are not removed yet (those come first)."""
        losses_N = torch.stack([one.losses() for one in self.readers]).sum(0)
        losses_N = torch.where(self._open_N, losses_N, torch.inf)
        groups_P = torch.argsort(losses_N, stable=True)[:most]
        return groups_P, self._open_N[groups_P]

    def take(self, groups: Tensor, losses: Tensor) -> None:
        """Record removed groups and update. Surplus entries are ignored."""
        self.order.append(self._names_N[groups])
        self.losses.append(losses)
        self.left = max(self.left - len(groups), 0)
        if not self.left:
            return
        for one in self.readers:
            one.drop(groups)
        self._open_N.index_fill_(0, groups, False)
        if POOL <= self.left < SHRINK * len(self._open_N):
            self._shrink()

    def _shrink(self) -> None:
        left_N = torch.argsort(self._open_N.byte(), descending=True, stable=True)[: self.left]
        self._names_N = self._names_N[left_N]
        self._open_N = torch.ones_like(left_N, dtype=torch.bool)
        for one in self.readers:
            one.shrink(left_N)


@dataclass(eq=False)
class _Pools:
    """Pools of readers with as many inputs of a group each, worked on as one.

    Args:
        owner_B: the set of each, by number; owners_SB the same as 0 and 1.
        square_BXX: H.
        gram_BXX: W'W.
        size: inputs of a group.
    """

    owner_B: Tensor
    owners_SB: Tensor
    square_BXX: Tensor
    gram_BXX: Tensor
    size: int

    @classmethod
    def of(cls, found: Sequence[tuple[int, Tensor, Tensor]], sets: int, size: int) -> _Pools:
        """Of (number of the set, H, W'W)."""
        device, dtype = found[0][1].device, found[0][1].dtype
        owner_B = torch.cat([torch.full((1,), number, device=device) for number, _, _ in found])
        owners_SB = (torch.arange(sets, device=device)[:, None] == owner_B).to(dtype)
        return cls(
            owner_B, owners_SB, torch.stack([one[1] for one in found]), torch.stack([one[2] for one in found]), size
        )

    def losses(self, open_SP: Tensor) -> Tensor:
        """Loss of each group of each set, over these readers."""
        loss_BP = removal_losses(diagonal_blocks(self.square_BXX, self.size), diagonal_blocks(self.gram_BXX, self.size))
        return self.owners_SB @ torch.where(open_SP[self.owner_B], loss_BP, 0.0)

    def drop(self, pick_S: Tensor) -> None:
        """Take one group of each set away. H loses ``H_R' (H_RR)^-1 H_R``; W'W follows ``W -= W_R (H_RR)^-1 H_R``."""
        inputs_BR = inputs_of(pick_S[self.owner_B][:, None], self.size)
        rows_BRX, own_BRR = _rows_of(self.square_BXX, inputs_BR)
        half_BRX, pull_BRX = _halves(own_BRR, rows_BRX)
        self.square_BXX.baddbmm_(half_BRX.mT, half_BRX, alpha=-1)
        lost_BRX, lost_BRR = _rows_of(self.gram_BXX, inputs_BR)
        lost_BRX = torch.baddbmm(lost_BRX, lost_BRR, pull_BRX, alpha=-0.5)
        first, second = torch.cat([pull_BRX, lost_BRX], 1), torch.cat([lost_BRX, pull_BRX], 1)
        self.gram_BXX.baddbmm_(first.mT, second, alpha=-1)


def _rows_of(square_BXX: Tensor, inputs_BR: Tensor) -> tuple[Tensor, Tensor]:
    """Some rows of each matrix, and of those the same columns."""
    rows_BRX = square_BXX.gather(1, inputs_BR[:, :, None].expand(-1, -1, square_BXX.shape[2]))
    return rows_BRX, rows_BRX.gather(2, inputs_BR[:, None, :].expand(-1, inputs_BR.shape[1], -1))


def cheapest_first(sets: Sequence[ReadSet]) -> list[tuple[Tensor, Tensor]]:
    """For each set the order of removal of its groups, and the loss of each at its turn.

    Args:
        sets: of at least :data:`POOL` groups, or all of the same number; on one device. Used up.
    """
    most = min(POOL, sets[0].count)
    while active := [one for one in sets if one.left]:
        _round(active, most)
    return [(torch.cat(one.order)[: one.count], torch.cat(one.losses)[: one.count]) for one in sets]


def _round(sets: Sequence[ReadSet], most: int) -> None:
    """Settle half a pool of every set."""
    pools = [one.cheapest(most) for one in sets]
    found: dict[int, list[tuple[int, Tensor, Tensor]]] = {}
    for number, (one, (groups_P, _)) in enumerate(zip(sets, pools, strict=True)):
        for reader in one.readers:
            found.setdefault(reader.size, []).append((number, *reader.pool(groups_P)))
    together = [_Pools.of(members, len(sets), size) for size, members in found.items()]
    steps = min(STEPS, most, max(one.left for one in sets))
    picks_ST, losses_ST = _eliminate(together, torch.stack([open_P for _, open_P in pools]), steps)
    for one, (groups_P, _), picks_T, losses_T in zip(sets, pools, picks_ST, losses_ST, strict=True):
        one.take(groups_P[picks_T], losses_T)


def _eliminate(pools: Sequence[_Pools], open_SP: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The groups of each pool in order of removal (sets, steps), and their losses."""
    open_SP = open_SP.clone()
    picks, losses = [], []
    for step in range(steps):
        loss_SP = torch.stack([one.losses(open_SP) for one in pools]).sum(0)
        loss_S, pick_S = torch.where(open_SP, loss_SP, torch.inf).min(1)
        picks.append(pick_S)
        losses.append(loss_S)
        open_SP.scatter_(1, pick_S[:, None], False)
        if step + 1 < steps:
            for one in pools:
                one.drop(pick_S)
    return torch.stack(picks, 1), torch.stack(losses, 1)
