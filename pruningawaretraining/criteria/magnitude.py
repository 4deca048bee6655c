"""Criteria that need only the weights.

Shape suffixes: ``_G`` groups, ``_S`` sets of groups, ``_W`` any weight.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pruningawaretraining.criteria.base import Needs, Statistics
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.groups.reductions import device_of, is_of_single_weights, members_per_set, reduce_sum
from pruningawaretraining.registry import lookup, register

logger = logging.getLogger(__name__)

WEIGHTS = ("out", "in", "norm", "made", "read", "element")


def power_sums(grouping: Grouping, p: float) -> Tensor:
    """Sums of ``|w|^p`` over a group's weight members; on a GPU nothing waits for the device."""
    weights = grouping.of_role(*WEIGHTS)

    def power(values_W: Tensor) -> Tensor:
        values_W = values_W.float()
        return values_W.square() if p == 2 else values_W.abs().pow(p)

    if is_of_single_weights(weights):
        return _powers(weights, p)
    if device_of(weights).type == "cpu" or any(member.slots is not None for member in weights.members):
        return weights.reduce_of(power)
    # by views: adding by an index is slow there, and rounds in another order each time
    return reduce_sum(weights, lambda member: power(member.parameter.detach()))


def _powers(weights: Grouping, p: float) -> Tensor:
    """``|w|^p`` of each weight where every one is a group, written where it belongs: memory costs more than sums."""
    out_G = torch.empty(weights.size, device=device_of(weights))
    for member in weights.members:
        values_W = member.parameter.detach().float()
        mine_W = out_G[member.offset : member.offset + member.n_slots].view(values_W.shape)
        torch.mul(values_W, values_W, out=mine_W) if p == 2 else torch.abs(values_W, out=mine_W).pow_(p)
    return out_G


def magnitude_scores(grouping: Grouping, p: float) -> Tensor:
    """Mean over a group's weight members of the sum of ``|w|^p`` (Fang et al. 2023, DepGraph, eq. 4)."""
    sums_G = power_sums(grouping, p)
    count_S = members_per_set(grouping.of_role(*WEIGHTS)).clamp(min=1)
    if bool((count_S == 1).all()):
        return sums_G
    return sums_G / count_S[grouping.set_ids].to(sums_G)


@register("normalizer", "none")
def unchanged(scores_G: Tensor, grouping: Grouping) -> Tensor:
    """Scores as they are."""
    return scores_G


@register("normalizer", "mean")
def by_mean(scores_G: Tensor, grouping: Grouping) -> Tensor:
    """Divided by the mean of the set, so that layers of different scale compare."""
    return _over_scale(scores_G, grouping, _scale(scores_G, grouping, torch.mean))


@register("normalizer", "max")
def by_max(scores_G: Tensor, grouping: Grouping) -> Tensor:
    """Divided by the largest score of the set."""
    return _over_scale(scores_G, grouping, _scale(scores_G, grouping, torch.max))


SET_SCALES: dict[str, Callable[[Tensor], Tensor]] = {"mean": torch.mean, "max": torch.max}
"""Normalizers that divide a set by one number, which stays the same from the first event on."""


def _scale(scores_G: Tensor, grouping: Grouping, by: Callable[[Tensor], Tensor]) -> list[float]:
    scales = [by(scores_G[one.start : one.stop]) if one.size else scores_G.new_ones(()) for one in grouping.sets]
    found: list[float] = torch.stack(scales).cpu().tolist() if scales else []  # the host waits once
    return found


def _scale_since(scores_G: Tensor, grouping: Grouping, statistics: Statistics) -> list[float]:
    """The scale of the first event, times how the groups that are kept have changed on average since then."""
    assert statistics.scale is not None and statistics.first_G is not None
    first_G = statistics.first_G.to(scores_G)
    keep_G = torch.ones_like(scores_G, dtype=torch.bool)
    if statistics.keep_G is not None:
        keep_G = statistics.keep_G.to(scores_G.device)
    scale = []
    for one, divisor in zip(grouping.sets, statistics.scale, strict=True):
        kept = keep_G[one.start : one.stop]
        now, then = scores_G[one.start : one.stop][kept].sum(), first_G[one.start : one.stop][kept].sum()
        scale.append(divisor * float(now / then) if float(then) > 0 else divisor)
    return scale


def _over_scale(scores_G: Tensor, grouping: Grouping, scale: list[float]) -> Tensor:
    """Every set's scores divided by its number, set by set: an index over groups would be larger."""
    out_G, tiny = scores_G.clone(), torch.finfo(scores_G.dtype).tiny
    for one, divisor in zip(grouping.sets, scale, strict=True):
        out_G[one.start : one.stop].div_(max(divisor, tiny))
    return out_G


@register("normalizer", "lamp")
def by_larger(scores_G: Tensor, grouping: Grouping) -> Tensor:
    """Divided by the sum of the scores of the set that are at least as large (Lee et al. 2021, LAMP)."""
    out_G = scores_G.clone()
    for one in grouping.sets:
        part = scores_G[one.start : one.stop]
        order = torch.argsort(part, descending=True, stable=True)
        out_G[one.start + order] = part[order] / part[order].cumsum(0).clamp(min=torch.finfo(part.dtype).tiny)
    return out_G


@register("criterion", "magnitude", "l2", "l2_norm", "group_norm", "GroupNormPruner")
@dataclass(frozen=True)
class Magnitude:
    """Size of the weights: mean over the coupled layers of the sum of ``|w|^p``.

    Args:
        p: the power; 2 for squared L2, 1 for L1.
        normalize: by the "mean" or "max" of the set, so that layers compare, by "lamp", or "none".
    """

    needs: ClassVar[Needs] = Needs(whole_layers=False)

    p: float = 2.0
    normalize: str = "mean"

    def __post_init__(self) -> None:
        if self.p <= 0:
            raise ValueError(f"p: {self.p!r} must be above 0")
        lookup("normalizer", self.normalize, "normalize")

    def plain(self, grouping: Grouping) -> Tensor:
        """Sums that rank the groups of one set as the scores do, without waiting for the device."""
        return power_sums(grouping, self.p)

    def score(self, grouping: Grouping, statistics: Statistics) -> Tensor:
        scores_G = magnitude_scores(grouping, self.p)
        by = SET_SCALES.get(self.normalize)
        if by is None:
            normalize: Callable[[Tensor, Grouping], Tensor] = lookup("normalizer", self.normalize)
            return normalize(scores_G, grouping)
        if statistics.scale is None or statistics.first_G is None:
            statistics.scale = _scale(scores_G, grouping, by)
            statistics.first_G = scores_G.detach()
            return _over_scale(scores_G, grouping, statistics.scale)
        return _over_scale(scores_G, grouping, _scale_since(scores_G, grouping, statistics))


@register("criterion", "l1", "l1_norm")
@dataclass(frozen=True)
class L1(Magnitude):
    """:class:`Magnitude` with p = 1."""

    p: float = 1.0


@register("criterion", "lamp")
@dataclass(frozen=True)
class Lamp(Magnitude):
    """:class:`Magnitude` with every score divided by the sum of those at least as large in its set (LAMP)."""

    normalize: str = "lamp"


@register("criterion", "bn_scale", "BNScalePruner")
@dataclass(frozen=True)
class NormScale:
    """Mean absolute weight of the norm layers behind a channel (Liu et al. 2017, Network Slimming).

    Sets without a norm layer score infinity: they are pruned last.
    """

    needs: ClassVar[Needs] = Needs(whole_layers=False)

    def check(self, grouping: Grouping, sets: Sequence[int], key: str) -> None:
        """Refuse a rule none of whose layers has a norm.

        Args:
            grouping: all groups.
            sets: numbers of the rule's sets.
            key: how messages call the rule.

        Raises:
            ConfigError: there is no norm behind any of its channels.
        """
        count_S = members_per_set(grouping.of_role("norm"))
        if sets and not bool((count_S[list(sets)] > 0).any()):
            raise ConfigError(
                f"{key}.criterion: 'bn_scale' needs norms, and no norm follows the layers of the rule. Allowed: "
                "magnitude, or another criterion"
            )

    def score(self, grouping: Grouping, statistics: Statistics) -> Tensor:
        norms = grouping.of_role("norm")
        sums_G = norms.reduce_of(lambda weight: weight.float().abs())
        count_S = members_per_set(norms)
        if bool((count_S == 0).any()):
            without = [one.name for one, count in zip(grouping.sets, count_S.tolist(), strict=True) if count == 0]
            logger.info("bn_scale: no norm layer in %s; these are pruned last", ", ".join(without))
        count_G = count_S[grouping.set_ids].to(sums_G)
        return torch.where(count_G > 0, sums_G / count_G.clamp(min=1), torch.inf)


@register("criterion", "random")
@dataclass(frozen=True)
class Random:
    """Random scores, the same at every event and on every rank for one seed.

    Args:
        seed: of the generator.
    """

    needs: ClassVar[Needs] = Needs(whole_layers=False)

    seed: int = 0

    def score(self, grouping: Grouping, statistics: Statistics) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(grouping.size, generator=generator)
