"""Criteria that compare groups with each other.

Shape suffixes: ``_G`` groups, ``_S`` slots of one member, ``_SE`` their entries as rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pruningawaretraining.criteria.base import Needs, Statistics
from pruningawaretraining.groups.grouping import Grouping, Member, add_slots
from pruningawaretraining.groups.reductions import device_of
from pruningawaretraining.groups.views import entry_vectors
from pruningawaretraining.registry import register

CHUNK = 1 << 22  # distances held at a time


@register("criterion", "geometric_median", "fpgm")
@dataclass(frozen=True)
class GeometricMedian:
    """Mean distance to the other groups of the set: those near the geometric median go first (He et al. 2019, FPGM).

    A channel is compared by its filters (averaged over the layers that it is coupled in), single weights and blocks by
    what they hold. Sets of more than ``exact`` groups take the distance to the median, found by Weiszfeld's iteration,
    in place of the mean over all pairs; single numbers are always exact.

    Args:
        exact: groups in a set up to which every pair is compared.
        iterations: of Weiszfeld's algorithm.
    """

    needs: ClassVar[Needs] = Needs(kinds=("channel", "expert", "weight"))

    exact: int = 4096
    iterations: int = 20

    def score(self, grouping: Grouping, statistics: Statistics) -> Tensor:
        """See :class:`~pruningawaretraining.criteria.base.Criterion`."""
        compared = grouping.of_role("out", "made", "element")
        total_G1 = torch.zeros(grouping.size + 1, device=device_of(grouping))
        count_G1 = torch.zeros_like(total_G1)
        for member in compared.members:
            distance_S = mean_distances(member, self.exact, self.iterations).to(total_G1.device)
            add_slots(total_G1, member, distance_S)
            add_slots(count_G1, member, torch.ones_like(distance_S))
        return torch.where(count_G1 > 0, total_G1 / count_G1.clamp(min=1), torch.inf)[:-1]


def mean_distances(member: Member, exact: int, iterations: int) -> Tensor:
    """For each slot of a member the mean distance to all slots, or to their median where there are many."""
    entries_SE = entry_vectors(member, member.parameter.detach()).float()
    if entries_SE.shape[1] == 1:
        return _on_a_line(entries_SE[:, 0])
    if len(entries_SE) > exact:
        away_SE = entries_SE - geometric_median(entries_SE, iterations)
        return away_SE.square().sum(1).sqrt()
    rows = max(1, CHUNK // max(1, len(entries_SE)))
    parts = [torch.cdist(part, entries_SE).mean(1) for part in torch.split(entries_SE, rows)]
    return torch.cat(parts) if parts else entries_SE.new_zeros(0)


def _on_a_line(values_S: Tensor) -> Tensor:
    """Mean distance between numbers, by sorting: ``sum |x_i - x_j| = x_i (2 i - n) + total - 2 sum before``."""
    ordered, order = torch.sort(values_S.double())
    before = torch.cumsum(ordered, 0) - ordered
    place = torch.arange(len(ordered), device=values_S.device)
    sums = ordered * (2 * place - len(ordered)) + ordered.sum() - 2 * before
    return torch.empty_like(values_S).scatter_(0, order, (sums / max(1, len(ordered))).float())


def geometric_median(points_SE: Tensor, iterations: int) -> Tensor:
    """The point with the least sum of distances to the rows of a matrix (Weiszfeld 1937)."""
    median_E = points_SE.mean(0)
    for _ in range(iterations):
        weight_S = (points_SE - median_E).square().sum(1).sqrt().clamp(min=1e-12).reciprocal()
        median_E = (weight_S @ points_SE) / weight_S.sum()
    return median_E
