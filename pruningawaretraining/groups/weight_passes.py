"""Sums of squares along rows and columns of many weights, and factors along them, with few launches.

On a GPU every operation is a launch, and a small one takes as long as its launch. A weight with groups along both of
its first dimensions costs two launches for the sums and one for the gradients; all one-dimensional parameters together
cost as much as one. Every weight is read for the sums (its columns while the rows have left it in the cache) and once
more for the gradients.

Shape suffixes: ``_G1`` groups and one more for what is outside all, ``_N`` entries (rows, columns) of all weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pruningawaretraining.distributed.fsdp import is_sharded
from pruningawaretraining.groups.weight_stores import Sided, WeightStore


class WeightPasses:
    """Sums and factors of one grouping's weights, laid out for where and how these are stored now.

    Args:
        weights: every parameter once.
        size: the number of groups, which also means "outside".
    """

    def __init__(self, weights: Sequence[Sided], size: int) -> None:
        self.weights, self.size = weights, size
        self.device = weights[0].parameter.device
        self.sharded = [one.parameter for one in weights if is_sharded(one.parameter)]
        self._signature = _signature(weights)
        stores: dict[tuple[torch.device, torch.dtype, bool], WeightStore] = {}
        for one in weights:
            key = one.parameter.device, one.parameter.dtype, is_sharded(one.parameter)
            stores.setdefault(key, WeightStore(*key)).take(one)
        self._stores = list(stores.values())
        for store in self._stores:
            store.close()

    @property
    def fits(self) -> bool:
        """Whether all weights are still stored as they were when this was laid out."""
        return self._signature == _signature(self.weights)

    def squared_norms(self) -> tuple[Tensor, Tensor | None]:
        """Sums of squares of every group: over weights that are whole here, and over this process's parts of others
        (None without any); two float32 vectors of groups and one entry more."""
        whole_G1 = torch.zeros(self.size + 1, device=self.device)
        part_G1 = torch.zeros_like(whole_G1) if self.sharded else None
        for store in self._stores:
            total_G1 = part_G1 if store.sharded and part_G1 is not None else whole_G1
            sums_N = store.square_sums()
            if store.device != self.device:
                sums_N = torch.zeros(self.size + 1, device=store.device).index_add_(0, store.entries_N, sums_N)
                total_G1 += sums_N.to(self.device)
            else:
                total_G1.index_add_(0, store.entries_N, sums_N)
        return whole_G1, part_G1

    def add_scaled(self, factor_G1: Tensor, only: set[int] | None) -> None:
        """``grad += factor * weight`` for every weight (of those with these ids) that has a gradient.

        Args:
            factor_G1: one factor for each group, and 0 for what is outside.
            only: ids of the parameters that are meant; None for all.
        """
        for store in self._stores:
            here_G1 = factor_G1 if store.device == self.device else factor_G1.to(store.device)
            store.add_scaled(here_G1.to(store.dtype).index_select(0, store.entries_N), only)


def _signature(weights: Iterable[Sided]) -> list[tuple[torch.device, torch.dtype, tuple[int, ...]]]:
    return [(one.parameter.device, one.parameter.dtype, one.parameter.stride()) for one in weights]
