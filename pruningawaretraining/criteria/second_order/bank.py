"""Which Fisher blocks are gathered when and where: passes over the gradients that fit in memory, shared over ranks.

Shape suffixes: ``_B`` blocks, ``_M`` gradients of a chunk, ``_D`` entries of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pruningawaretraining.criteria.second_order.fisher import Fisher, Storage, make_fisher, stored_bytes
from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.criteria.second_order.weights import PrunableWeight
from pruningawaretraining.distributed.collectives import ALONE, Ranks
from pruningawaretraining.errors import ConfigError

CHUNK = (16, 256)
"""Least and most gradients that are gathered before they are added."""


@dataclass(frozen=True)
class Budget:
    """Memory limits of the Fisher.

    Args:
        num_grads: gradients behind it.
        damp: added to its diagonal.
        max_memory: bytes for what is stored and one chunk, on every rank; None for no limit.
        in_parallel: blocks that are factored at once; None for what fits in a fixed workspace.
        storage: where it lives.
    """

    num_grads: int
    damp: float
    max_memory: int | None = None
    in_parallel: int | None = None
    storage: Storage = Storage()

    def chunk(self, width: int, world: int = 1) -> int:
        """Gradients of a chunk, on each rank: enough for the products to be worth their memory traffic."""
        wanted = min(max(width // 2, CHUNK[0]), CHUNK[1], self.num_grads)
        return -(-wanted // world)

    def bytes_per_block(self, width: int) -> int:
        """Memory of one block, its part of a chunk included."""
        size = torch.empty((), dtype=self.storage.dtype).element_size()
        stored = 0 if self.storage.folder else stored_bytes(1, width, self.num_grads) * size // 4
        return stored + size * width * self.chunk(width)


@dataclass(frozen=True)
class Span:
    """A run of blocks of one weight.

    Args:
        weight: its number.
        start, stop: the blocks.
        owner: the rank that keeps them.
    """

    weight: int
    start: int
    stop: int
    owner: int = 0

    @property
    def blocks(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def bounds(self) -> tuple[int, int]:
        return self.start, self.stop

    def __len__(self) -> int:
        return self.stop - self.start


def plan_passes(weights: Sequence[PrunableWeight], budget: Budget, ranks: Ranks = ALONE) -> list[list[Span]]:
    """Cut all blocks into passes that fit in memory, and each pass into the ranks' shares.

    A pass holds at least one block, so too small a limit makes many passes, not an error.
    """
    passes: list[list[Span]] = [[]]
    limit = None if budget.max_memory is None else budget.max_memory * ranks.world
    used = 0
    for number, weight in enumerate(weights):
        each = budget.bytes_per_block(weight.layout.width)
        start = 0
        while start < weight.layout.blocks:
            room = weight.layout.blocks - start if limit is None else (limit - used) // each
            if room <= 0 and passes[-1]:
                passes.append([])
                used = 0
                continue
            stop = min(start + max(room, 1), weight.layout.blocks)
            passes[-1].append(Span(number, start, stop))
            used += each * (stop - start)
            start = stop
    return [_shared(one, weights, budget, ranks.world) for one in passes]


def _shared(spans: list[Span], weights: Sequence[PrunableWeight], budget: Budget, world: int) -> list[Span]:
    """The spans cut so that every rank owns about as many bytes."""
    if world == 1:
        return spans
    each = [budget.bytes_per_block(weights[span.weight].layout.width) for span in spans]
    fair = sum(cost * len(span) for cost, span in zip(each, spans, strict=True)) / world
    cut, before = [], 0.0
    for cost, span in zip(each, spans, strict=True):
        start = span.start
        while start < span.stop:
            owner = min(int(before / fair), world - 1)
            room = max(1, round(((owner + 1) * fair - before) / cost)) if owner < world - 1 else span.stop - start
            stop = min(start + room, span.stop)
            cut.append(replace(span, start=start, stop=stop, owner=owner))
            before += cost * (stop - start)
            start = stop
    return cut


class Bank:
    """The Fisher blocks of one pass: those that this rank owns.

    Args:
        spans: the blocks of the pass, of all ranks.
        weights: all weights.
        budget: see there.
        ranks: this process.
    """

    def __init__(
        self, spans: Sequence[Span], weights: Sequence[PrunableWeight], budget: Budget, ranks: Ranks = ALONE
    ) -> None:
        self.spans, self.weights, self.budget, self.ranks = spans, weights, budget, ranks
        self.fishers: dict[Span, Fisher] = {}
        self.share = ranks.share(budget.num_grads)
        widest = max(weights[span.weight].layout.width for span in spans)
        self.chunk = min(budget.chunk(widest, ranks.world), self.share)
        most = -(-self.share // self.chunk) * self.chunk * ranks.world if ranks.world > 1 else self.share
        for span in spans:
            if span.owner == ranks.rank:
                weight = weights[span.weight]
                where = budget.storage.beside(weight.parameter.device)
                self.fishers[span] = make_fisher(len(span), weight.layout.width, budget.damp, most, where)

    def collect(self, calibration: Calibration) -> Bank:
        """Gather the gradients. With several ranks each brings its share, from its own data."""
        numbers = sorted({span.weight for span in self.spans})
        chunk = _Chunk(self, numbers)
        parameters = [self.weights[number].parameter for number in numbers]
        done = calibration.each_gradient(parameters, self.share, chunk.add)
        chunk.flush_until(self.share)
        total = self.ranks.total(done)
        for fisher in self.fishers.values():
            fisher.count = total
        return self


class _Chunk:
    """Gradients that have been gathered and not yet been added."""

    def __init__(self, bank: Bank, numbers: Sequence[int]) -> None:
        self.bank, self.size = bank, bank.chunk
        self.filled = self.flushed = 0
        self.spans = [[span for span in bank.spans if span.weight == number] for number in numbers]
        self.layouts = [bank.weights[number].layout for number in numbers]
        self.buffers: dict[Span, Tensor] = {}

    def _buffer(self, span: Span, width: int, device: torch.device) -> Tensor:
        if span not in self.buffers:
            dtype = self.bank.budget.storage.dtype
            self.buffers[span] = torch.zeros(len(span), self.size, width, dtype=dtype, device=device)
        return self.buffers[span]

    def add(self, gradients: list[Tensor]) -> None:
        """Take one gradient of every weight of the pass."""
        for spans, layout, gradient in zip(self.spans, self.layouts, gradients, strict=True):
            blocks_BD = layout.to_blocks(gradient.detach())
            for span in spans:
                self._buffer(span, layout.width, gradient.device)[:, self.filled].copy_(blocks_BD[span.blocks])
        self.filled += 1
        if self.filled == self.size:
            self.flush()

    def flush(self) -> None:
        """Hand the chunk to the owners; what is not filled is 0."""
        alone = self.bank.ranks.world == 1
        for span in self.bank.spans:
            width = self.bank.weights[span.weight].layout.width
            buffer = self._buffer(span, width, self.bank.weights[span.weight].parameter.device)
            gathered = self.bank.ranks.gather(buffer[:, : self.filled] if alone else buffer, span.owner)
            if gathered is not None:
                self.bank.fishers[span].add(gathered)
            if not alone:
                buffer.zero_()
        self.flushed += self.size
        self.filled = 0

    def flush_until(self, count: int) -> None:
        """Flush what is left, and as often as every other rank does."""
        while self.flushed < count and (self.filled or self.bank.ranks.world > 1):
            self.flush()


def storage(device: str | None, folder: str | None) -> Storage:
    """Where the Fisher lives, from a config's options.

    Raises:
        ConfigError: the device does not exist.
    """
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"fisher_inv_device: there is no {device!r} here. Allowed: 'cpu', or leave it out")
    return Storage(None if device is None else torch.device(device), None if folder is None else Path(folder))
