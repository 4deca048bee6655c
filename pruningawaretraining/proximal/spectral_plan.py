"""The plan for maps of singular values.

Shape suffixes: ``_BK`` singular values of the matrices in a weight, ``_B`` their ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pruningawaretraining.distributed.fsdp import Shards, full_of, local_of, part_of
from pruningawaretraining.proximal.low_rank import (
    Decomposition,
    Factors,
    SpectralGrouper,
    factors_of,
    shrunk_values,
)
from pruningawaretraining.proximal.maps import Scale, SpectralMap
from pruningawaretraining.proximal.weight_pairs import WeightPair


class SpectralPlan:
    """Singular values of every weight."""

    def __init__(self, prox: SpectralMap, grouper: SpectralGrouper, parts: Sequence[WeightPair], slope: float) -> None:
        self.prox, self.grouper, self.parts, self.slope = prox, grouper, tuple(parts), slope
        self.ranks: list[Tensor] = []

    def run(self, scale: Scale, fraction: float) -> None:
        """Take one proximal step, and note the ranks that are left (not yet read from the device)."""
        self.ranks = []
        for part in self.parts:
            full = full_of(part.source)
            found = Decomposition.of(self.grouper.matrices(full))
            values_BK = shrunk_values(self.prox, found.S, scale, self.slope, fraction)
            self.ranks.append(torch.count_nonzero(values_BK, dim=-1))
            self._write(part, full, found, values_BK)

    def project(self, ranks: Sequence[Tensor]) -> None:
        """Cut the weights back to given ranks (one vector of them for each weight)."""
        for part, rank_B in zip(self.parts, ranks, strict=True):
            full = full_of(part.source)
            found = Decomposition.of(self.grouper.matrices(full))
            kept = torch.arange(found.S.shape[-1], device=found.S.device) < rank_B.unsqueeze(-1)
            self._write(part, full, found, found.S * kept)

    def factors(self, scale: Scale, fraction: float) -> list[Factors]:
        """The factors of the (only) weight after the map."""
        found = Decomposition.of(self.grouper.matrices(full_of(self.parts[0].source)))
        return factors_of(found, shrunk_values(self.prox, found.S, scale, self.slope, fraction))

    def factors_of_ranks(self, rank_B: Tensor) -> list[Factors]:
        """The factors of the (only) weight at given ranks."""
        found = Decomposition.of(self.grouper.matrices(full_of(self.parts[0].source)))
        kept = torch.arange(found.S.shape[-1], device=found.S.device) < rank_B.unsqueeze(-1)
        return factors_of(found, found.S * kept)

    def _write(self, part: WeightPair, full: Tensor, found: Decomposition, values_BK: Tensor) -> None:
        result = torch.empty_like(full, memory_format=torch.preserve_format)
        self.grouper.write(found.product(values_BK), result)
        if Shards.of(part.target) is not None:
            result = part_of(part.target, result)
        local_of(part.target).copy_(result)
