"""Criteria from activations: weights matter by the inputs they multiply.

Shape suffixes: ``_G`` groups, ``_S`` slots of one member, ``_R`` rows (output channels), ``_W`` any weight.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pruningawaretraining.criteria.base import Needs, Statistics
from pruningawaretraining.criteria.input_moments import ActivationCollector
from pruningawaretraining.criteria.magnitude import magnitude_scores
from pruningawaretraining.groups.grouping import Grouping, Member
from pruningawaretraining.groups.reductions import Reduction, reduce_sum
from pruningawaretraining.registry import lookup, register

logger = logging.getLogger(__name__)

WEIGHTS = ("out", "in", "made", "read", "element")


@dataclass(frozen=True)
class _FromActivations:
    """Base of the activation criteria.

    Args:
        momentum: how much earlier batches still count at the next one; 1 for all alike.
        in_eval: listen in eval mode too (calibration), not only while training.
    """

    momentum: float = 1.0
    in_eval: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.momentum <= 1:
            raise ValueError(f"momentum: {self.momentum!r} must be in (0, 1]")

    def collector(self) -> ActivationCollector:
        """A new collector."""
        return ActivationCollector(self.momentum, self.in_eval)


def _factors(grouping: Grouping, statistics: Statistics, key: str, who: object) -> dict[str, Tensor]:
    """The statistic of every weight member by parameter name; ones before any activation is seen."""
    names = [member.name for member in grouping.members if member.role in WEIGHTS]
    found = {name: statistics.tensors[f"{key}.{name}"] for name in names if f"{key}.{name}" in statistics.tensors}
    if not found:
        logger.warning("%s: no activation has been seen yet; weights are ranked by size", type(who).__name__)
        return {name: torch.ones(()) for name in names}
    unheard = {member.name for member in grouping.members if member.role in ("made", "read")}  # by no layer's hook
    found |= dict.fromkeys(unheard - found.keys(), torch.ones(()))
    missing = sorted(set(names) - set(found))
    if missing:
        logger.info("no activation ever reached %s; they are pruned first", ", ".join(missing))
    return found


@register("criterion", "wanda")
@dataclass(frozen=True)
class Wanda(_FromActivations):
    """``|w| ||x||_2``, compared within each output row (Sun et al. 2024, Wanda).

    Args:
        momentum: how much earlier batches still count at the next one; 1 for all alike.
        in_eval: listen in eval mode too (calibration), not only while training.
        reduction: "mean", "sum" or "max" over the group.
        by_row: the score is the rank within the output row, in [0, 1), so that every row loses the same share; for
            patterns that cut rows (not for whole channels).
    """

    needs: ClassVar[Needs] = Needs(kinds=("channel", "block", "weight"))

    reduction: str = "mean"
    by_row: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        lookup("reduction", self.reduction, "reduction")

    def score(self, grouping: Grouping, statistics: Statistics) -> Tensor:
        """See :class:`~pruningawaretraining.criteria.base.Criterion`."""
        squares = _factors(grouping, statistics, "input_squares", self)

        def values(member: Member) -> Tensor | None:
            factor = squares.get(member.name)
            weight_W = member.parameter.detach().float().abs()
            return None if factor is None or member.role not in WEIGHTS else weight_W * factor.to(weight_W).sqrt()

        reduce: Reduction = lookup("reduction", self.reduction)
        scores_G = reduce(grouping, values, torch.float32)
        if not self.by_row or any(member.slots is not None for member in grouping.members):
            return scores_G
        for member in grouping.members:
            row_dim = int(statistics.tensors.get(f"row_dim.{member.name}", torch.tensor(0)))
            mine = scores_G[member.offset : member.offset + member.n_slots]
            mine.copy_(_ranks_in_rows(mine.view(member.sizes), row_dim).reshape(-1))
        return scores_G


def _ranks_in_rows(scores_S: Tensor, row_dim: int) -> Tensor:
    """The rank of every slot within its row, as a fraction of the row's length."""
    by_row = scores_S.movedim(row_dim, 0)
    flat_RS = by_row.reshape(by_row.shape[0], -1)
    order = torch.argsort(flat_RS, dim=1, stable=True)
    places = torch.arange(flat_RS.shape[1], device=order.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, places)
    return (ranks.float() / flat_RS.shape[1]).view(by_row.shape).movedim(0, row_dim)


def _consumers(grouping: Grouping) -> Grouping:
    """The members that read a group's activation: input columns of its consumers, or the weights themselves."""
    return grouping.of_role("in", "element")


def _known_last(scores_G: Tensor, grouping: Grouping, known: dict[str, Tensor]) -> Tensor:
    """Give groups whose activation is unread an infinite score."""

    def ones(member: Member) -> Tensor | None:
        return torch.ones_like(member.parameter) if member.name in known else None

    read_G = reduce_sum(_consumers(grouping), ones, torch.float32)
    return torch.where(read_G.to(scores_G.device) > 0, scores_G, torch.inf)


@register("criterion", "variance", "VBP")
@dataclass(frozen=True)
class Variance(_FromActivations):
    """``sigma_c^2``, the variance of a channel's activation after norm and non-linearity.

    It is measured where the consumers read it, and averaged over them. A group of single weights takes the mean
    variance of the inputs that they multiply.

    Args:
        momentum: how much earlier batches still count at the next one; 1 for all alike.
        in_eval: listen in eval mode too (calibration), not only while training.
        normalize: by the "mean" or "max" of the set, so that layers compare, by "lamp", or "none".
    """

    needs: ClassVar[Needs] = Needs(kinds=("channel", "weight"))

    normalize: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        lookup("normalizer", self.normalize, "normalize")

    def score(self, grouping: Grouping, statistics: Statistics) -> Tensor:
        """See :class:`~pruningawaretraining.criteria.base.Criterion`."""
        variance_G, known = self._variance(grouping, statistics)
        return self._ranked(variance_G, grouping, known)

    def _ranked(self, scores_G: Tensor, grouping: Grouping, known: dict[str, Tensor]) -> Tensor:
        """Scores normalised across layers; channels that no layer reads rank last."""
        normalized_G: Tensor = lookup("normalizer", self.normalize)(scores_G, grouping)
        return _known_last(normalized_G, grouping, known)

    def _variance(self, grouping: Grouping, statistics: Statistics) -> tuple[Tensor, dict[str, Tensor]]:
        known = _factors(grouping, statistics, "input_variance", self)
        mean: Reduction = lookup("reduction", "mean")

        def values(member: Member) -> Tensor | None:
            factor = known.get(member.name)
            parameter = member.parameter
            return None if factor is None else factor.to(parameter.device).expand(parameter.shape).contiguous()

        return mean(_consumers(grouping), values, torch.float32), known


@register("criterion", "variance_next")
@dataclass(frozen=True)
class VarianceNext(Variance):
    """``||W_next[:, c]|| sigma_c``: how far the consumers' outputs move when the channel goes (in squares over all).

    Args:
        momentum: how much earlier batches still count at the next one; 1 for all alike.
        in_eval: listen in eval mode too (calibration), not only while training.
        normalize: by the "mean" or "max" of the set, so that layers compare, by "lamp", or "none".
    """

    def score(self, grouping: Grouping, statistics: Statistics) -> Tensor:
        """See :class:`~pruningawaretraining.criteria.base.Criterion`."""
        known = _factors(grouping, statistics, "input_variance", self)

        def values(member: Member) -> Tensor | None:
            factor = known.get(member.name)
            weight_W = member.parameter.detach().float()
            return None if factor is None else weight_W.square() * factor.to(weight_W)

        moved_G = reduce_sum(_consumers(grouping), values, torch.float32).sqrt()
        return self._ranked(moved_G, grouping, known)


@register("criterion", "variance_magnitude")
@dataclass(frozen=True)
class VarianceMagnitude(Variance):
    """Group magnitude times ``sigma_c``.

    Args:
        momentum: how much earlier batches still count at the next one; 1 for all alike.
        in_eval: listen in eval mode too (calibration), not only while training.
        normalize: by the "mean" or "max" of the set, so that layers compare, by "lamp", or "none".
        p: of the magnitude, the mean over members of the sum of ``|w|^p``.
    """

    p: float = 2.0

    def score(self, grouping: Grouping, statistics: Statistics) -> Tensor:
        """See :class:`~pruningawaretraining.criteria.base.Criterion`."""
        variance_G, known = self._variance(grouping, statistics)
        magnitude_G = magnitude_scores(grouping, self.p).to(variance_G)
        return self._ranked(magnitude_G * variance_G.sqrt(), grouping, known)
