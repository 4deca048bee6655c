"""Ranking within runs of groups, all runs at once.

Shape suffixes: ``_G`` groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST = 2**20
"""With more groups than this, sorting each run alone is as fast as sorting twice over all."""


class Runs(tuple[slice, ...]):
    """Runs that follow one another, with what their ranking needs on the groups' device: the run of each group, the
    size of that run, and the group's place in it."""

    ids_G: Tensor
    sizes_G: Tensor
    places_G: Tensor

    @classmethod
    def on(cls, runs: Sequence[slice], device: torch.device) -> Runs | None:
        """The runs on a device; None where each is better ranked alone."""
        stops = [run.stop for run in runs]
        if [run.start for run in runs] != [0, *stops[:-1]] or len(runs) < 2 or stops[-1] > LARGEST:
            return None
        made = cls(runs)
        sizes = torch.tensor([run.stop - run.start for run in runs])
        ids_G = torch.arange(len(runs)).repeat_interleave(sizes, output_size=stops[-1])
        starts = torch.tensor([run.start for run in runs])
        made.ids_G, made.sizes_G = ids_G.to(device), sizes[ids_G].double().to(device)
        made.places_G = (torch.arange(stops[-1]) - starts[ids_G]).to(device)
        return made

    def keep_largest(self, norms_G: Tensor, fraction: float, slack: float) -> Tensor:
        """1 for the groups that stay and 0 for the ``ceil(fraction * groups - slack)`` smallest of every run; the first
        of equals goes."""
        by_norm = norms_G.argsort(stable=True)
        order = by_norm[self.ids_G[by_norm].argsort(stable=True)]
        keep_G = (self.places_G >= self.sizes_G * fraction - slack).to(norms_G.dtype)
        return torch.empty_like(norms_G).index_copy_(0, order, keep_G)
