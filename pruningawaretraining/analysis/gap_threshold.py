"""From which epoch to prune, and below which norm: read off the histograms of group norms.

Norms of layers of different widths do not compare, so each is taken relative to its own set: divided by the norm that
a tenth of the set's groups exceed. On that scale regularised groups fall apart into two heaps, those near zero and the
others, and the threshold lies in the gap between the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pruningawaretraining.report.run import Run

LARGE = 0.9  # quantile of a set's norms that the others are measured by
HIGHEST = 0.35  # a threshold above this part of the large norms would cut into groups that are alive
PER_DECADE = 8  # bins in which gaps are looked for; finer ones are mostly empty
FALLBACK = 0.1  # threshold without a gap
DEPTH = 0.6  # a gap: the valley is lower than the smaller of its two peaks by this part
SETTLED = 0.02  # of all groups: how much the mass near zero may still change


@dataclass(frozen=True)
class Choice:
    """When to start pruning, and which groups are near zero, by one run's norms.

    Attributes:
        epoch: after which to start; None when nothing was recorded, or of a single checkpoint.
        threshold: groups below this part of their set's large norms are near zero.
        share: fraction of the groups near zero after that epoch.
        depth: how deep the gap is, 0 (none) to 1 (empty).
        separated: whether there is a gap.
        settled: whether the mass near zero had stopped changing before the last epoch.
        reason: the same in words.
    """

    epoch: int | None
    threshold: float
    share: float
    depth: float
    separated: bool
    settled: bool
    reason: str


def choose(run: Run) -> Choice:
    """The epoch to start pruning after, and the threshold, of a run or of scanned checkpoints."""
    edges = run.norms.get("edges") or []
    moments = before_pruning(run.norms.get("epochs") or [])
    if len(edges) < 2 or not moments:
        return Choice(None, FALLBACK, 0.0, 0.0, False, False, _reason_of_none(run.norms))
    threshold, depth = gap(edges, moments[-1]["sets"])
    separated = threshold is not None
    threshold = FALLBACK if threshold is None else threshold
    shares = [share(edges, moment["sets"], threshold) for moment in moments]
    at = _settled_at(shares) if separated else len(shares) - 1
    settled = at < len(shares) - 1
    epoch = int(moments[at]["epoch"])
    last = int(moments[-1]["epoch"])
    gap_depth = depth if separated else None
    if len(moments) == 1:
        reason = _reason_of_one(threshold, gap_depth, moments[0], shares[0])
    else:
        reason = _reason(threshold, gap_depth, (epoch, shares[at]), (last, shares[-1]), settled)
    on_their_way = share(edges, moments[-1]["sets"], max(FALLBACK, threshold)) - shares[-1]
    if separated and on_their_way > SETTLED:
        reason += f" Another {100 * on_their_way:.1f}% are on their way there, below {FALLBACK} of the large norms."
    start = None if one_file(run.norms) else epoch
    return Choice(start, threshold, shares[at], depth, separated, settled, reason)


def one_file(norms: Mapping[str, Any]) -> bool:
    """Whether these are the norms of a single checkpoint, and not of a training."""
    epochs = norms.get("epochs") or []
    return len(epochs) == 1 and bool(epochs[0].get("file"))


def _reason_of_none(norms: Mapping[str, Any]) -> str:
    if not one_file(norms):
        return "No norms were recorded before pruning began."
    (moment,) = norms["epochs"]
    whole = sum(one["size"] + one.get("removed", 0) for one in moment["sets"].values())
    return f"It has been pruned: {100 * _gone(moment) / max(whole, 1):.1f}% of its groups are gone."


def _reason_of_one(threshold: float, depth: float | None, moment: Mapping[str, Any], near: float) -> str:
    """The reason for a single moment, whose norms say nothing about time."""
    where = f"in {moment['file']}" if moment.get("file") else f"after epoch {moment['epoch']}"
    if depth is None:
        return (
            f"The norms have not fallen apart {where}: there is no gap near zero, and {100 * near:.1f}% of the groups "
            f"lie below {threshold:.2g} of their layer's large norms."
        )
    return (
        f"{_heap(threshold, depth)}It holds {100 * near:.1f}% of the groups {where}. One moment does not say whether "
        "the heap still grows."
    )


def _reason(
    threshold: float, depth: float | None, start: tuple[int, float], last: tuple[int, float], settled: bool
) -> str:
    epoch, near = start
    if depth is None:
        return (
            f"The norms have not fallen apart by epoch {last[0]}: there is no gap near zero, and {100 * last[1]:.1f}% "
            f"of the groups lie below {threshold:.2g} of their layer's large norms."
        )
    text = _heap(threshold, depth)
    if not settled:
        return text + (
            f"Up to the last epoch looked at, {last[0]}, the heap still grows ({100 * last[1]:.1f}% of the groups): "
            "start no earlier than there."
        )
    return text + (
        f"It holds {100 * near:.1f}% of the groups after epoch {epoch}, and {100 * last[1]:.1f}% after epoch "
        f"{last[0]}: waiting longer changes little."
    )


def _heap(threshold: float, depth: float) -> str:
    gap_text = "empty" if depth > 0.995 else f"{100 * depth:.0f}% deep"
    return (
        f"Below {threshold:.2g} of their layer's large norms lies a heap of groups near zero, and the gap above it is "
        f"{gap_text}. "
    )


def before_pruning(epochs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Epochs before the first mask or removal; if there are none, those that lost no groups."""
    if "regularize" in [moment.get("phase") for moment in epochs]:
        free = [moment for moment in epochs if moment.get("phase") == "regularize"]
        return [moment for moment in free if _gone(moment) <= _gone(free[0])]  # the last one's event masks some
    return [moment for moment in epochs if not any(one.get("removed") for one in moment["sets"].values())]


def _gone(moment: Mapping[str, Any]) -> int:
    return sum(one.get("zeros", 0) + one.get("removed", 0) for one in moment["sets"].values())


def with_removed(norms: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded norms with the number of removed groups of each set, relative to the first epoch with that set."""
    first: dict[str, int] = {}
    epochs = []
    for moment in norms.get("epochs") or []:
        sets = {}
        for name, one in moment["sets"].items():
            lost = first.setdefault(name, one["size"]) - one["size"]
            sets[name] = {"removed": max(0, lost), **one}
        epochs.append({**moment, "sets": sets})
    return {**norms, "epochs": epochs}


def _settled_at(shares: Sequence[float]) -> int:
    """The first position from which on the share stays about what it is at the end: a small heap has to be there."""
    allowed = max(min(SETTLED, 0.5 * shares[-1]), 0.1 * shares[-1])
    at = len(shares) - 1
    while at > 0 and abs(shares[at - 1] - shares[-1]) <= allowed:
        at -= 1
    return at


def large_norm(edges: Sequence[float], counts: Sequence[int]) -> float | None:
    """The norm that a tenth of a set's living groups exceed: the middle of its bin; None when all are zero."""
    total, seen = sum(counts), 0
    for number, count in enumerate(counts):
        seen += count
        if count and seen >= LARGE * total:
            return math.sqrt(edges[number] * edges[number + 1])
    return None


def near_zero(edges: Sequence[float], counts: Sequence[int], threshold: float) -> list[int]:
    """The part of each bin that lies below the threshold: whole bins, by their middles."""
    large = large_norm(edges, counts)
    limit = 0.0 if large is None else threshold * large
    middles = (math.sqrt(left * right) for left, right in zip(edges, edges[1:], strict=False))
    return [count if middle < limit else 0 for count, middle in zip(counts, middles, strict=True)]


def share(edges: Sequence[float], sets: Mapping[str, Mapping[str, Any]], threshold: float) -> float:
    """The fraction of the groups near zero, those at zero and those removed included."""
    near = whole = 0
    for one in sets.values():
        gone = one.get("zeros", 0) + one.get("removed", 0)
        near += gone + sum(near_zero(edges, one["counts"], threshold))
        whole += gone + sum(one["counts"])
    return near / max(whole, 1)


def gap(edges: Sequence[float], sets: Mapping[str, Mapping[str, Any]]) -> tuple[float | None, float]:
    """The threshold in the deepest gap of the relative norms (None without a gap), and its depth.

    Of several gaps as deep, which groups on their way to zero leave behind them, the uppermost counts.
    """
    counts, per_bin = _relative(edges, sets)
    smooth = _smoothed(counts)
    total, best, ties = sum(counts), 0.0, []
    top = len(counts) - 1 + math.floor(math.log10(HIGHEST) / per_bin)
    for at in range(1, min(top, len(counts) - 1)):
        below = sum(counts[:at])
        if below < max(3, 0.01 * total):
            continue
        peak = min(max(smooth[:at]), max(smooth[at + 1 :]))
        depth = (peak - smooth[at]) / peak if peak > 0 else 0.0
        if peak - smooth[at] < 1.5 * math.sqrt(peak):  # within what chance does to a histogram
            continue
        if depth > best + 1e-9:
            best, ties = depth, [at]
        elif depth > best - 1e-9:
            ties.append(at)
    if best < DEPTH:
        return None, best
    last = _runs(ties)[-1]  # the one next to the groups that are alive
    middle = last[len(last) // 2]
    return 10 ** ((middle - (len(counts) - 1) + 0.5) * per_bin), best


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Ascending numbers in runs without holes."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def _relative(edges: Sequence[float], sets: Mapping[str, Mapping[str, Any]]) -> tuple[list[float], float]:
    """Counts of all sets over norms relative to their own; the last bin is that of the large norms and above.

    Groups that are exactly zero count in the lowest bin. Also gives the width of a bin in decades.
    """
    per_bin = math.log10(edges[1] / edges[0])
    size = len(edges) - 1
    found = [0.0] * size
    for one in sets.values():
        large = large_norm(edges, one["counts"])
        if large is None:
            found[0] += one.get("zeros", 0)
            continue
        top = min(range(size), key=lambda at: abs(math.log10(edges[at]) + per_bin / 2 - math.log10(large)))
        for at, count in enumerate(one["counts"]):
            found[max(0, min(size - 1, size - 1 - top + at))] += count
        found[0] += one.get("zeros", 0)
    merged = max(1, round(1 / (PER_DECADE * per_bin)))
    coarse = [sum(found[max(0, stop - merged) : stop]) for stop in range(size, 0, -merged)]
    return coarse[::-1], merged * per_bin


def _smoothed(counts: Sequence[float]) -> list[float]:
    """Each count averaged with its neighbours, themselves weighing double."""
    padded = [counts[0], *counts, counts[-1]]
    triples = zip(padded, padded[1:], padded[2:], strict=False)
    return [(left + 2 * middle + right) / 4 for left, middle, right in triples]
