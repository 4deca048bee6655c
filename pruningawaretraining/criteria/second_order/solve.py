"""From Fisher blocks to pruned weights, for any number of sparsities from one collection of gradients.

Shape suffixes: ``_W`` the shape of a weight, ``_B`` blocks, ``_D`` entries of a block, ``_T`` tiles of a block, ``_S``
the order of candidates in a block, ``_N`` the candidates of a layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from pruningawaretraining.criteria.second_order.bank import Bank, Budget, Span, plan_passes
from pruningawaretraining.criteria.second_order.fisher import Fisher, parts
from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.criteria.second_order.layout import Layout
from pruningawaretraining.criteria.second_order.weights import PrunableWeight
from pruningawaretraining.distributed.collectives import Ranks
from pruningawaretraining.errors import TargetError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranking:
    """Candidates of some blocks, those of each block in order of removal.

    Args:
        scores_BS: what decides, never falling along a block where the order matters; infinite for what must stay.
        tiles_BS: which tile each is.
    """

    scores_BS: Tensor
    tiles_BS: Tensor


@dataclass(frozen=True)
class FisherBlocks:
    """Some blocks of one weight, ready to be ranked or updated (on the device of the Fisher).

    Args:
        fisher: theirs.
        part: which of the Fisher's blocks.
        layout: of the weight.
        weights_BD: values, float64.
        alive_BD: entries that are neither padding nor masked.
        open_BT: tiles that may go.
    """

    fisher: Fisher
    part: slice
    layout: Layout
    weights_BD: Tensor
    alive_BD: Tensor
    open_BT: Tensor

    def inverse(self) -> Tensor:
        """H = F^-1 in float64."""
        return self.fisher.inverses(self.part, self.alive_BD)


class BlockMethod(Protocol):
    """Scores and updates of blocks, by OBS or CAP."""

    def rank(self, blocks: FisherBlocks) -> Ranking:
        """Score every tile."""

    def update(self, blocks: FisherBlocks, prune_BT: Tensor) -> Tensor:
        """The updated weights after pruning tiles, float64."""


@dataclass(frozen=True)
class Pruned:
    """One weight at one sparsity.

    Args:
        weight_W: the new weight.
        keep_W: True where it stays.
    """

    weight_W: Tensor
    keep_W: Tensor


Results = dict[float, dict[str, Pruned]]


@dataclass(frozen=True)
class Candidates:
    """Candidates of one layer, in the order that breaks ties.

    Args:
        scores_N: the lowest go first.
        removed_N: gone already; they count.
        exempt_N: not to be pruned, and in no count (padding, and what N:M keeps).
    """

    scores_N: Tensor
    removed_N: Tensor
    exempt_N: Tensor


Choose = Callable[[Sequence[Candidates], float], list[Tensor]]
"""(layers, fraction of what counts) -> for each layer True where it stays; see ``one_shot.chooser``."""


@dataclass
class Table:
    """Scores of every block of a weight."""

    scores_BS: Tensor
    tiles_BS: Tensor


@dataclass(eq=False)
class BlockSolver:
    """Ranks all weights, decides once for every sparsity, and updates.

    Args:
        weights: what to prune.
        method: OBS or CAP.
        calibration: where gradients come from.
        budget: what they may cost.
        choose: how sparsity is shared out.
        ranks: this process.
    """

    weights: Sequence[PrunableWeight]
    method: BlockMethod
    calibration: Calibration
    budget: Budget
    choose: Choose
    ranks: Ranks = field(default_factory=Ranks.current)

    def solve(self, fractions: Sequence[float]) -> Results:
        """The weights at each sparsity (fraction of the prunable tiles; see :func:`share_of`)."""
        passes = plan_passes(self.weights, self.budget, self.ranks)
        if len(passes) > 1:
            logger.info("the Fisher does not fit in max_memory: %d passes over the gradients, twice", len(passes))
        tables = [_empty_table(weight) for weight in self.weights]
        bank: Bank | None = None
        for spans in passes:
            bank = None  # freed before the next one is made
            bank = self._collect(spans)
            for span in spans:
                self._rank(bank, span, tables[span.weight])
        chosen = [choose_tiles(self.weights, tables, self.choose, fraction) for fraction in fractions]
        values = [[weight.blocks() for weight in self.weights] for _ in fractions]
        for number, spans in enumerate(reversed(passes)):
            if number:
                bank = None
                bank = self._collect(spans)
            assert bank is not None
            for span in spans:
                self._update(bank, span, chosen, values)
        return {
            fraction: {
                weight.name: pruned(weight, blocks_BD, prune_BT)
                for weight, blocks_BD, prune_BT in zip(self.weights, blocks, masks, strict=True)
            }
            for fraction, blocks, masks in zip(fractions, values, chosen, strict=True)
        }

    def _collect(self, spans: Sequence[Span]) -> Bank:
        return Bank(spans, self.weights, self.budget, self.ranks).collect(self.calibration)

    def _parts(self, bank: Bank, span: Span) -> Iterator[tuple[slice, FisherBlocks]]:
        """The owned blocks of a span, a few at a time: (where in the weight, the blocks)."""
        weight, fisher = self.weights[span.weight], bank.fishers[span]
        values_BD = weight.blocks()[span.blocks]
        device = self.budget.storage.device or weight.device
        for part in parts(len(span), weight.layout.width, self.budget.in_parallel, device.type == "cpu"):
            where = slice(span.start + part.start, span.start + part.stop)
            tensors = values_BD[part].double(), weight.alive_BD[where], weight.open_BT[where]
            yield where, FisherBlocks(fisher, part, weight.layout, *(tensor.to(device) for tensor in tensors))

    def _rank(self, bank: Bank, span: Span, table: Table) -> None:
        if span.owner == self.ranks.rank:
            for where, blocks in self._parts(bank, span):
                ranking = self.method.rank(blocks)
                table.scores_BS[where] = ranking.scores_BS.to(table.scores_BS)
                table.tiles_BS[where] = ranking.tiles_BS.to(table.tiles_BS)
        for tensor in (table.scores_BS, table.tiles_BS):
            tensor[span.blocks] = self.ranks.broadcast(tensor[span.blocks], span.owner)

    def _update(self, bank: Bank, span: Span, chosen: list[list[Tensor]], values: list[list[Tensor]]) -> None:
        if span.owner == self.ranks.rank:
            for where, blocks in self._parts(bank, span):
                for masks, result in zip(chosen, values, strict=True):
                    prune_BT = masks[span.weight][where].to(blocks.open_BT.device)
                    changed = self.method.update(blocks, prune_BT)
                    result[span.weight][where] = changed.to(result[span.weight])
        for result in values:
            blocks_BD = result[span.weight]
            blocks_BD[span.blocks] = self.ranks.broadcast(blocks_BD[span.blocks], span.owner)


def choose_tiles(
    weights: Sequence[PrunableWeight], tables: Sequence[Table], choose: Choose, fraction: float
) -> list[Tensor]:
    """For every weight, the tiles to prune, without those pruned already."""
    pairs = list(zip(weights, tables, strict=True))
    candidates = [candidates_of(weight, table.scores_BS, table.tiles_BS) for weight, table in pairs]
    kept = choose(candidates, fraction_left(weights, candidates, fraction))
    chosen = []
    for (weight, table), one, keep_N in zip(pairs, candidates, kept, strict=True):
        going_BS = (~keep_N.to(one.removed_N.device) & ~one.removed_N).reshape(table.scores_BS.shape)
        chosen.append(torch.zeros_like(weight.open_BT).scatter_(1, table.tiles_BS.long(), going_BS))
    return chosen


def _empty_table(weight: PrunableWeight) -> Table:
    steps = slots(weight.layout)
    shape = (weight.layout.blocks, steps)
    device = weight.device
    return Table(torch.full(shape, torch.inf, device=device), torch.zeros(shape, dtype=torch.int32, device=device))


def slots(layout: Layout) -> int:
    """Largest number of tiles of a block that may be pruned."""
    of = layout.tile.of
    return layout.tiles // of * (of - layout.tile.keep) if of else layout.tiles


def candidates_of(weight: PrunableWeight, scores_BS: Tensor, tiles_BS: Tensor) -> Candidates:
    """A weight's scores as candidates. In N:M the kept N of M are exempt, as are pruned tiles."""
    gone_BS = (weight.valid_BT & ~weight.open_BT).gather(1, tiles_BS.long())
    if weight.layout.tile.of:
        gone_BS = torch.zeros_like(gone_BS)
    exempt_BS = torch.isinf(scores_BS) & ~gone_BS
    return Candidates(scores_BS.flatten(), gone_BS.flatten(), exempt_BS.flatten())


def fraction_left(weights: Sequence[PrunableWeight], candidates: Sequence[Candidates], fraction: float) -> float:
    """The fraction of the candidates that is to go: in N:M only what is not gone yet is among them."""
    if not any(weight.layout.tile.of for weight in weights):
        return fraction
    gone = sum(int((weight.valid_BT & ~weight.open_BT).sum()) for weight in weights)
    left = sum(int((~one.exempt_N).sum()) for one in candidates)
    return min(max((fraction * (gone + left) - gone) / left, 0.0), 1.0) if left else 0.0


def share_of(layout: Layout, sparsity: float, key: str = "sparsities") -> float:
    """A sparsity as the fraction of the tiles that may be pruned.

    Raises:
        TargetError: N:M, and another sparsity than the pattern's.
    """
    tile = layout.tile
    if not tile.of:
        return sparsity
    only = tile.most
    if abs(sparsity - only) > 1e-6:
        raise TargetError(f"{key}: {sparsity} is not possible with {tile.keep}:{tile.of}. Allowed: {only:.4g}")
    return 1.0


def pruned(weight: PrunableWeight, blocks_BD: Tensor, prune_BT: Tensor) -> Pruned:
    """A weight's new values and mask, in its own shape."""
    layout = weight.layout
    keep_W = layout.from_blocks(weight.alive_BD & ~layout.spread(prune_BT))
    value_W = layout.from_blocks(blocks_BD).to(weight.parameter)
    return Pruned(torch.where(keep_W.to(value_W.device), value_W, 0), keep_W)
