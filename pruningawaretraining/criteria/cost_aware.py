"""Criteria that weigh importance against the MACs that a group costs.

Shape suffixes: ``_G`` groups, ``_S`` sets of groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pruningawaretraining.criteria.base import Needs, Statistics, scores_of
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.registry import build, lookup, register


def source_macs(grouping: Grouping, statistics: Statistics) -> Tensor:
    """Dense MACs of the layer that stands for each group's set (vector of groups)."""
    macs = _need_macs(statistics)
    by_name = dict(zip(macs.names, macs.base_L.tolist(), strict=True))
    values_S = torch.tensor([by_name.get(one.name, 0.0) for one in grouping.sets], dtype=torch.float64)
    return values_S[grouping.set_ids]


def _need_macs(statistics: Statistics) -> Any:
    if statistics.macs is None:
        raise ConfigError("criterion: 'mac_aware' needs a pattern that saves MACs, such as 'channel'")
    return statistics.macs


@register("mac_weighting", "sum", "Sum")
def weigh_sum(scores_G: Tensor, grouping: Grouping, statistics: Statistics, alpha: float, beta: float) -> Tensor:
    """``alpha score / max + (1 - alpha) (1 - (m - min m) / (max m - min m))``."""
    macs_G = source_macs(grouping, statistics)
    span = (macs_G.max() - macs_G.min()).clamp(min=1.0)
    return alpha * scores_G / scores_G.max().clamp(min=1e-30) + (1 - alpha) * (1 - (macs_G - macs_G.min()) / span)


@register("mac_weighting", "mul", "Mul")
def weigh_mul(scores_G: Tensor, grouping: Grouping, statistics: Statistics, alpha: float, beta: float) -> Tensor:
    """``score (min m / m)^(1 / beta)``."""
    macs_G = source_macs(grouping, statistics).clamp(min=1.0)
    return scores_G * (macs_G.min() / macs_G) ** (1 / beta)


@register("mac_weighting", "per_mac")
def weigh_per_mac(scores_G: Tensor, grouping: Grouping, statistics: Statistics, alpha: float, beta: float) -> Tensor:
    """``score / MACs that removing the group saves``, as the model stands."""
    keep_G = torch.ones(grouping.size, dtype=torch.bool) if statistics.keep_G is None else statistics.keep_G
    saving_G: Tensor = _need_macs(statistics).saving_G(keep_G)
    return scores_G / saving_G.clamp(min=1.0)


@register("criterion", "mac_aware", "MACAwareImportance")
@dataclass(frozen=True)
class MacAware:
    """Another criterion's scores, weighed by MACs so that expensive channels go first.

    Args:
        base: the criterion.
        mode: "sum", "mul" or "per_mac".
        alpha: weight of the importance in "sum", in [0, 1].
        beta: root of the MAC ratio in "mul", above 0.
    """

    needs: ClassVar[Needs] = Needs(kinds=("channel", "block"), whole_layers=False)

    base: Any = "magnitude"
    mode: str = "sum"
    alpha: float = 0.5
    beta: float = 1.0

    def __post_init__(self) -> None:
        lookup("mac_weighting", self.mode, "mode")
        if not 0 <= self.alpha <= 1 or self.beta <= 0:
            raise ValueError(f"alpha: {self.alpha!r} must be in [0, 1], beta: {self.beta!r} above 0")
        object.__setattr__(self, "base", build("criterion", self.base, "criterion.base"))

    def score(self, grouping: Grouping, statistics: Statistics) -> Tensor:
        weigh: Callable[..., Tensor] = lookup("mac_weighting", self.mode)
        scores_G = scores_of(self.base, grouping, statistics).cpu().double()
        finite_G = torch.isfinite(scores_G)  # groups that a criterion puts last stay last
        largest = scores_G[finite_G].max() if bool(finite_G.any()) else scores_G.new_ones(())
        weighed_G = weigh(torch.where(finite_G, scores_G, largest), grouping, statistics, self.alpha, self.beta)
        return torch.where(finite_G, weighed_G, scores_G)
