"""The lowest of very many scores, class by class, the first among equals, on the host or without it.

Shape suffixes: ``_G`` all groups, ``_N`` a run of them, ``_RC`` groups in rows of :data:`ROW`, ``_R`` these rows,
``_S`` runs of rows.

On the CPU the threshold is found by partition. Elsewhere the host never learns it: the scores' bits, made to count
upwards as the scores do, are compared with one number for each run at a time, and each comparison settles one bit of
the threshold. All runs take part in the same few operations, so that many layers cost no more launches than one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 22  # groups looked at together when ties are counted on the host
ROW = 1024  # groups in a row: flags of a row are counted as 128 words of 8 bytes, and no byte overflows
SHORT = 16  # rows up to so long are ranked by comparing each entry with every other
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def on_host(values_N: Tensor) -> bool:
    """Whether values are the host's own, to be looked at without waiting for a device."""
    return values_N.device.type == "cpu"


def drop_lowest(values: Sequence[Tensor], keeps: Sequence[Tensor], count: int) -> None:
    """Clear, in place, the keep flags of the ``count`` lowest of several runs on the CPU; among equals the first go."""
    if count <= 0:
        return
    threshold = _smallest(values, count)
    below = [value_N < threshold for value_N in values]
    remaining = count - sum(int(flags_N.count_nonzero()) for flags_N in below)
    for value_N, keep_N, flags_N in zip(values, keeps, below, strict=True):
        keep_N.masked_fill_(flags_N, False)
        for value_C, keep_C in _chunks(value_N, keep_N):
            if remaining <= 0:
                break
            ties = torch.nonzero(value_C == threshold).flatten()[:remaining]
            keep_C[ties] = False
            remaining -= len(ties)


def _chunks(values_N: Tensor, keep_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(values_N, CHUNK), torch.split(keep_N, CHUNK), strict=True)


def _smallest(values: Sequence[Tensor], count: int) -> Tensor:
    """The ``count``-th smallest of several runs, by selection."""
    joined_N = values[0] if len(values) == 1 else torch.cat(list(values))
    if joined_N.dtype == torch.bfloat16:  # NumPy has none; its bits, made to count upwards, are ordered as it is
        found = _partition(ordered_bits(joined_N).numpy(), count)
        found = torch.where(found < 0, found ^ 0x7FFF, found)
        return found.view(torch.bfloat16)
    return _partition(joined_N.numpy(), count)


def _partition(values_N: np.ndarray, count: int) -> Tensor:
    return torch.from_numpy(np.partition(values_N, count - 1)[count - 1 : count].copy())[0]


def ordered_bits(values_N: Tensor) -> Tensor:
    """Whole numbers of the same width that are ordered as floating ones are; -0 and 0 are one."""
    dtype = BITS[values_N.element_size()]
    bits_N = (values_N + 0.0).view(dtype)
    flipped_N = bits_N >> torch.iinfo(dtype).bits - 1  # all ones where the sign is
    return bits_N.bitwise_xor_(flipped_N.bitwise_and_(torch.iinfo(dtype).max))


@dataclass(frozen=True, eq=False)
class Rows:
    """Layout of runs of groups in rows of :data:`ROW`: each run begins a row, and its last row is padded.

    Args:
        sizes: groups of each run, in the order of the groups.
        order: numbers of the runs in the order of the rows.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def counts(self) -> list[int]:
        """Rows of each run, in the order of the rows."""
        return [-(-self.sizes[number] // ROW) for number in self.order]

    @property
    def _plain(self) -> bool:
        """Whether the rows are the groups as they are."""
        return self.order == tuple(range(len(self.sizes))) and all(size % ROW == 0 for size in self.sizes)

    def pack(self, values_G: Tensor, fill: int) -> Tensor:
        """Rows of a vector over groups (a view where they are the same), with ``fill`` where there is no group."""
        if self._plain and values_G.storage_offset() * values_G.element_size() % 8 == 0:
            return values_G.view(-1, ROW)
        parts_S, rest_C = torch.split(values_G, list(self.sizes)), values_G.new_full((ROW,), fill)
        pieces = [piece for number in self.order for piece in (parts_S[number], rest_C[: -self.sizes[number] % ROW])]
        return torch.cat(pieces).view(-1, ROW)

    def unpack(self, values_RC: Tensor) -> Tensor:
        """The vector over groups again."""
        if self._plain:
            return values_RC.view(-1)
        runs = dict(zip(self.order, torch.split(values_RC, self.counts), strict=True))
        return torch.cat([runs[number].reshape(-1)[:size] for number, size in enumerate(self.sizes)])


class Runs:
    """Runs of neighbouring rows that are counted, or ranked, one by one in the same operations.

    Args:
        rows: how many rows each has.
        device: where the groups are.
    """

    def __init__(self, rows: Sequence[int], device: torch.device) -> None:
        rows_S = torch.tensor(rows, dtype=torch.int64, device=device)
        self.ends_S = rows_S.cumsum(0)
        self.starts_S = self.ends_S - rows_S
        numbers_S = torch.arange(len(rows), device=device)
        self.number_R = torch.repeat_interleave(numbers_S, rows_S, output_size=sum(rows))

    def count(self, flags_RC: Tensor) -> Tensor:
        """Number of set flags of each run, int64."""
        totals_R = torch.nn.functional.pad(_row_counts(flags_RC).cumsum(0), (1, 0))
        return totals_R[self.ends_S] - totals_R[self.starts_S]

    def lowest(self, bits_RC: Tensor, counts_S: Tensor) -> Tensor:
        """Flags of the lowest of each run, so many as ``counts_S`` says, the first among equals.

        Args:
            bits_RC: whole numbers (:func:`ordered_bits`); the largest of their type stands where there is nothing.
            counts_S: int64, at most what is there.
        """
        found_R1 = self._threshold(bits_RC, counts_S)[self.number_R].unsqueeze(1)
        lowest_RC = bits_RC < found_R1
        ties_RC = bits_RC == found_R1
        ties_R = _row_counts(ties_RC)
        before_R = ties_R.cumsum(0) - ties_R
        first_S = torch.nn.functional.pad(ties_R.cumsum(0), (1, 0))[self.starts_S]
        left_R = (counts_S - self.count(lowest_RC) + first_S)[self.number_R] - before_R
        left_R1 = left_R.clamp(0, ROW).to(torch.int16).unsqueeze(1)
        places_RC = ties_RC.cumsum(1, dtype=torch.int16)  # of each tie among those of its row, from 1
        ties_RC &= places_RC <= left_R1
        return lowest_RC.logical_or_(ties_RC)

    def _threshold(self, bits_RC: Tensor, counts_S: Tensor) -> Tensor:
        """The counts-th lowest of each run: the largest number that fewer than so many are below, bit by bit."""
        kind = torch.iinfo(bits_RC.dtype)
        found_S = torch.full(counts_S.shape, kind.min, dtype=bits_RC.dtype, device=bits_RC.device)
        below_RC = torch.empty_like(bits_RC, dtype=torch.bool)
        for bit in reversed(range(kind.bits)):
            tried_S = torch.zeros_like(found_S) if bit == kind.bits - 1 else found_S + (1 << bit)
            torch.lt(bits_RC, tried_S[self.number_R].unsqueeze(1), out=below_RC)
            found_S = torch.where(self.count(below_RC) < counts_S, tried_S, found_S)
        return found_S


def _row_counts(flags_RC: Tensor) -> Tensor:
    """How many flags of each row are set, by words of 8: a sum of flags makes each of them 8 bytes wide first."""
    eighths_R = flags_RC.view(torch.int64).sum(1)
    return eighths_R.view(torch.uint8).view(-1, 8).sum(1)


def counts_of(flags_G: Tensor, sizes: Sequence[int]) -> list[int]:
    """Number of set flags of each run; synchronizes with the device once."""
    if on_host(flags_G):
        return [int(part.count_nonzero()) for part in torch.split(flags_G, list(sizes))]
    rows = Rows(tuple(sizes), tuple(range(len(sizes))))
    found: list[int] = Runs(rows.counts, flags_G.device).count(rows.pack(flags_G, 0)).cpu().tolist()
    return found


class Ranking(Protocol):
    """Groups of several sets, ranked by their scores within classes of sets."""

    def without_lowest(self, wanted: Mapping[int, int]) -> Tensor:
        """Keep flags (vector of groups) without so many of the lowest of each class, the first among equals."""

    def bound(self, counted: Sequence[int], least: Sequence[int], most: Sequence[int]) -> None:
        """Put what must go from a set before everything, and what must stay after everything.

        Args:
            counted: groups of each set that may go.
            least, most: how many of them must, and may.
        """


class HostRanking:
    """On the CPU, one class after the other.

    Args:
        values_G: scores, changed by bounds.
        sizes_S: groups of each set.
        classes: the class of each set.
    """

    def __init__(self, values_G: Tensor, sizes_S: Sequence[int], classes: Sequence[int]) -> None:
        self.values_G, self.classes = values_G, classes
        self.parts = torch.split(values_G, list(sizes_S))

    def without_lowest(self, wanted: Mapping[int, int]) -> Tensor:
        keep_G = torch.ones_like(self.values_G, dtype=torch.bool)
        keeps = torch.split(keep_G, [len(part) for part in self.parts])
        for number, count in wanted.items():
            mine = [index for index, one in enumerate(self.classes) if one == number]
            if len(mine) == len(self.parts):
                drop_lowest([self.values_G], [keep_G], count)
            else:
                drop_lowest([self.parts[index] for index in mine], [keeps[index] for index in mine], count)
        return keep_G

    def bound(self, counted: Sequence[int], least: Sequence[int], most: Sequence[int]) -> None:
        for part, count, low, high in zip(self.parts, counted, least, most, strict=True):
            if high < count:
                allowed_N = torch.ones_like(part, dtype=torch.bool)
                drop_lowest([part], [allowed_N], high)
                part.masked_fill_(allowed_N, math.inf)
            if low > 0:
                stays_N = torch.ones_like(part, dtype=torch.bool)
                drop_lowest([part], [stays_N], low)
                part.masked_fill_(~stays_N, -math.inf)


class DeviceRanking:
    """On any device, all sets at once; the host waits for nothing but the few numbers that it hands over.

    Args, as of :class:`HostRanking`.
    """

    def __init__(self, values_G: Tensor, sizes_S: Sequence[int], classes: Sequence[int]) -> None:
        order = sorted(range(len(sizes_S)), key=classes.__getitem__)
        self.classes = classes
        self.rows = Rows(tuple(sizes_S), tuple(order))
        self.kind = torch.iinfo(BITS[values_G.element_size()])
        self.bits_RC = self.rows.pack(ordered_bits(values_G), self.kind.max)

    def without_lowest(self, wanted: Mapping[int, int]) -> Tensor:
        rows = dict.fromkeys(sorted(wanted), 0)
        for number, count in zip(self.rows.order, self.rows.counts, strict=True):
            rows[self.classes[number]] += count
        return self.rows.unpack(self._lowest(list(rows.values()), [wanted[one] for one in rows])).logical_not_()

    def bound(self, counted: Sequence[int], least: Sequence[int], most: Sequence[int]) -> None:
        rows, order = self.rows.counts, self.rows.order
        may_RC = self._lowest(rows, [most[number] for number in order])
        must_RC = self._lowest(rows, [least[number] for number in order])
        self.bits_RC = self.bits_RC.masked_fill(~may_RC, self.kind.max).masked_fill_(must_RC, self.kind.min)

    def _lowest(self, rows: Sequence[int], counts: Sequence[int]) -> Tensor:
        device = self.bits_RC.device
        return Runs(rows, device).lowest(self.bits_RC, torch.tensor(counts, dtype=torch.int64, device=device))


def ranking(values_G: Tensor, sizes_S: Sequence[int], classes: Sequence[int]) -> Ranking:
    """The ranking that suits where the scores are; it may change them."""
    made = HostRanking if on_host(values_G) else DeviceRanking
    return made(values_G, sizes_S, classes)


def lowest_share(scores_G: Tensor, among_G: Tensor, part: int, parts: int) -> Tensor:
    """Flags of the ``part / parts`` lowest of the chosen groups (rounded down), without the host.

    Args:
        scores_G: scores without NaN.
        among_G: the groups to choose from.
        part, parts: the fraction.
    """
    rows = Rows((len(scores_G),), (0,))
    bits_G = ordered_bits(scores_G)
    largest = torch.iinfo(bits_G.dtype).max
    runs = Runs(rows.counts, scores_G.device)
    counts_S = runs.count(rows.pack(among_G, 0)) * part // parts
    return rows.unpack(runs.lowest(rows.pack(bits_G.masked_fill_(~among_G, largest), largest), counts_S))


def lowest_in_rows(values: Tensor, count: int) -> Tensor:
    """True for the ``count`` lowest of every short row (the last dimension), the first among equals, on any device.

    The rank of an entry is how many come before it: earlier ones that are not larger, and later ones that are smaller.
    """
    width = values.shape[-1]
    if width > SHORT:
        places = values.argsort(dim=-1, stable=True)[..., :count]
        return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, places, True)
    ranks = torch.zeros_like(values, dtype=torch.uint8)
    for column in range(width):
        one = values[..., column : column + 1]
        ranks[..., column + 1 :].add_(one <= values[..., column + 1 :])
        ranks[..., :column].add_(one < values[..., :column])
    return ranks < count
