"""Metrics of a proximal run, counted from the weights when asked, never during a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from pruningawaretraining.distributed.fsdp import Shards, local_of
from pruningawaretraining.proximal.latent import ParamSlot
from pruningawaretraining.proximal.low_rank import Factors, SpectralGrouper
from pruningawaretraining.proximal.prox_groups import ParamGroup, Unit
from pruningawaretraining.proximal.spectral_plan import SpectralPlan


@dataclass(frozen=True)
class Reached:
    """Fractions over all regularised weights.

    Args:
        sparsity: elements that are 0, or saved by factors.
        factored: size of the factors of low-rank weights over the size of the weights.
    """

    sparsity: float
    factored: float


@torch.no_grad()
def weight_sparsity(weight_W: Tensor) -> float:
    """Fraction of a weight's elements that is 0 (a collective for a sharded one)."""
    zeros, total = _zeros(weight_W).tolist()
    return zeros / total if total else 0.0


def _zeros(weight_W: Tensor) -> Tensor:
    """Zeros and elements, over all the shards."""
    part = local_of(weight_W)
    counts = torch.stack([(part == 0).sum(dtype=torch.float64), part.new_full((), part.numel(), dtype=torch.float64)])
    shards = Shards.of(weight_W)
    if shards is not None:
        shards.all_reduce_(counts)
    return counts


@torch.no_grad()
def measure(units: Sequence[Unit], groups: Sequence[ParamGroup], state: Mapping[Tensor, Any]) -> Reached:
    """Count the zeros and ranks of all regularised weights.

    Args:
        units: the optimizer's units.
        groups: its param groups.
        state: its state, with the ranks.
    """
    gone = total = factors = dense = 0.0
    for unit in units:
        grouper = unit.options.grouper
        for place in unit.places(groups):
            if not isinstance(grouper, SpectralGrouper):
                zeros, size = _zeros(place.weight).tolist()
                gone, total = gone + zeros, total + size
                continue
            size = float(place.weight.numel())
            kept = size
            if "rank" in state.get(place.weight, {}):
                rows, columns = _matrix_shape(grouper, place.weight)
                kept = float(state[place.weight]["rank"].sum()) * (rows + columns)
            gone, total = gone + max(0.0, size - kept), total + size
            factors, dense = factors + kept, dense + size
    return Reached(gone / total if total else 0.0, factors / dense if dense else 0.0)


def _matrix_shape(grouper: SpectralGrouper, weight_W: Tensor) -> tuple[int, int]:
    shape = grouper.matrices(torch.empty(weight_W.shape, device="meta")).shape
    return shape[-2], shape[-1]


def weight_factors(
    unit: Unit, place: ParamSlot, own: Mapping[str, Any], groups: Sequence[ParamGroup], fraction: float
) -> list[Factors]:
    """The factors of a low-rank weight.

    Args:
        unit: its unit.
        place: the weight.
        own: its state.
        groups: the param groups.
        fraction: of singular values, that a hard map zeroes now.
    """
    source = own.get("latent", place.weight)
    plan = cast(SpectralPlan, Unit(unit.indices, unit.options).plan([place], [source]))
    if "latent" in own and "rank" in own:
        return plan.factors(unit.scale(groups), fraction)
    if "rank" in own and unit.options.through_heal:
        return plan.factors_of_ranks(own["rank"])
    return plan.factors(0.0, 0.0)
