"""Proximal maps: what happens to a group, given its norm.

Shape suffixes: ``_G`` groups, ``_K`` singular values (last dimension), ``_W`` any weight.

Soft maps shrink by a threshold ``T = reg_lambda * tau * gamma``; hard maps meet a constraint and ignore lambda and
gamma. Each map says which kind of thing it acts on by its base class: the norms of groups, elements, or singular
values. None divides by zero: 0/0 is 0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from pruningawaretraining.errors import ConfigError
from pruningawaretraining.proximal.runs import Runs
from pruningawaretraining.registry import lookup, register

Scale: TypeAlias = float | Tensor
"""``reg_lambda * gamma``; a scalar tensor where the learning rate is one."""

SLACK = 1e-6  # of one group: keeps 0.07 * 100 from becoming 8


def removed_count(fraction: float, groups: int) -> int:
    """``ceil(fraction * groups)``, free of float error: 0.07 of 100 groups are 7."""
    return min(groups, max(0, math.ceil(fraction * groups - SLACK)))


class ProxMap:
    """Base of all proximal maps; the classes below are frozen dataclasses.

    Attributes:
        hard: whether the map meets a constraint, instead of shrinking by a threshold.
        target: the fraction that a hard map with a ramp removes in the end.
    """

    hard: ClassVar[bool] = False

    @property
    def target(self) -> float:
        return 0.0


class GroupMap(ProxMap, ABC):
    """A map that multiplies each group by a factor that depends on norms."""

    @abstractmethod
    def factors(
        self, norms_G: Tensor, sizes_G: Tensor, threshold_G: Tensor | None, runs: Sequence[slice], fraction: float
    ) -> Tensor:
        """The factor of each group.

        Args:
            norms_G: L2 norm of each group; may be overwritten.
            sizes_G: elements of each group, in the norms' dtype.
            threshold_G: threshold of each group; None for 0.
            runs: the groups that are ranked among themselves (one weight, or one set of coupled layers).
            fraction: of the groups, to be zeroed by a hard map.
        """


class ElementMap(ProxMap):
    """A map of single elements, possibly ranked within their group."""


class SpectralMap(ProxMap, ABC):
    """A map of singular values."""

    @abstractmethod
    def shrink(self, values_K: Tensor, threshold: Scale, fraction: float) -> Tensor:
        """New singular values.

        Args:
            values_K: singular values, largest first, along the last dimension.
            threshold: scalar, or one value for each singular value.
            fraction: of the values, to be zeroed by a hard map.
        """


@register("prox", "ProxLasso", "proxlasso")
@dataclass(frozen=True)
class ProxLasso(ElementMap):
    """Soft thresholding of every element: ``x * max(0, 1 - T / |x|)``, tau = 1, whatever the grouper."""


@register("prox", "ProxGroupLasso", "proxgrouplasso")
@dataclass(frozen=True)
class ProxGroupLasso(GroupMap):
    """Group lasso: ``g * max(0, 1 - T / ||g||_2)``, tau = square root of the group's size (Yuan and Lin 2006)."""

    def factors(
        self, norms_G: Tensor, sizes_G: Tensor, threshold_G: Tensor | None, runs: Sequence[slice], fraction: float
    ) -> Tensor:
        """``max(0, ||g|| - T) / ||g||``: exactly 1 at T = 0, and 0 for a group at 0."""
        if threshold_G is None:
            return norms_G.fill_(1.0)
        left_G = torch.sub(norms_G, threshold_G).relu_()
        return torch.div(left_G, norms_G.clamp_min_(torch.finfo(norms_G.dtype).tiny), out=norms_G)


@dataclass(frozen=True)
class _Constraint(ProxMap):
    """A fraction that is zeroed.

    Args:
        min_sparsity: fraction in [0, 1].

    Raises:
        ConfigError: it is outside.
    """

    min_sparsity: float
    hard: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.min_sparsity <= 1:
            raise ConfigError(f"min_sparsity: {self.min_sparsity!r} is not allowed. Allowed: a number in [0, 1]")

    @property
    def target(self) -> float:
        return self.min_sparsity


@register("prox", "MinSparsityConstraint", "minsparsityconstraint")
@dataclass(frozen=True)
class MinSparsityConstraint(_Constraint, GroupMap):
    """Zeroes the ``ceil(min_sparsity * G)`` groups of smallest L2 norm of every weight."""

    def factors(
        self, norms_G: Tensor, sizes_G: Tensor, threshold_G: Tensor | None, runs: Sequence[slice], fraction: float
    ) -> Tensor:
        if isinstance(runs, Runs):
            return runs.keep_largest(norms_G, fraction, SLACK)
        keep_G = torch.ones_like(norms_G)
        for run in runs:
            zero_smallest_(keep_G[run], norms_G[run], fraction)
        return keep_G


@register("score", "rms")
def by_root_mean_square(norms_G: Tensor, sizes_G: Tensor) -> Tensor:
    """``||g|| / sqrt(size)``."""
    return norms_G / sizes_G.sqrt()


@register("score", "l2")
def by_norm(norms_G: Tensor, sizes_G: Tensor) -> Tensor:
    """``||g||``."""
    return norms_G


@register("score", "param_cost")
def by_cost(norms_G: Tensor, sizes_G: Tensor) -> Tensor:
    """``||g|| / size``: what a parameter of the group is worth."""
    return norms_G / sizes_G


@register("prox", "GlobalMinSparsityConstraint", "globalminsparsityconstraint")
@dataclass(frozen=True)
class GlobalMinSparsityConstraint(_Constraint, GroupMap):
    """Zeroes the ``ceil(min_sparsity * G)`` groups of lowest score of all the weights of an optimizer group.

    Args:
        min_sparsity: fraction in [0, 1].
        score_type: "rms" (norm over the root of the group's size), "l2" (norm) or "param_cost" (norm over size).
    """

    score_type: str = "rms"

    def __post_init__(self) -> None:
        super().__post_init__()
        lookup("score", self.score_type, "score_type")

    def factors(
        self, norms_G: Tensor, sizes_G: Tensor, threshold_G: Tensor | None, runs: Sequence[slice], fraction: float
    ) -> Tensor:
        score: Callable[[Tensor, Tensor], Tensor] = lookup("score", self.score_type)
        scores_G = score(norms_G, sizes_G)
        zero_smallest_(keep_G := torch.ones_like(norms_G), scores_G, fraction)
        return keep_G


def zero_smallest_(keep_G: Tensor, scores_G: Tensor, fraction: float) -> None:
    """Zero exactly ``ceil(fraction * G)`` entries of lowest score; topk breaks ties."""
    count = removed_count(fraction, keep_G.numel())
    if count >= keep_G.numel():
        keep_G.zero_()
    elif count:
        keep_G.index_fill_(0, scores_G.topk(count, largest=False, sorted=False).indices, 0.0)


@register("prox", "NMSparseConstraint", "nmsparseconstraint")
@dataclass(frozen=True)
class NMSparseConstraint(ElementMap):
    """Keeps the ``n_nonzero`` elements of largest magnitude of every group; the first of equals stays.

    Args:
        n_nonzero: elements that stay.

    Raises:
        ConfigError: it is negative.
    """

    n_nonzero: int
    hard: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.n_nonzero < 0:
            raise ConfigError(f"n_nonzero: {self.n_nonzero} is not allowed. Allowed: a whole number of 0 or more")


@register("prox", "ProxNuclearNorm", "proxnuclearnorm")
@dataclass(frozen=True)
class ProxNuclearNorm(SpectralMap):
    """Soft thresholding of singular values, ``relu(s - T)``, tau = 1."""

    def shrink(self, values_K: Tensor, threshold: Scale, fraction: float) -> Tensor:
        return (values_K - threshold).relu_()


@register("prox", "MinRankConstraint", "minrankconstraint")
@dataclass(frozen=True)
class MinRankConstraint(_Constraint, SpectralMap):
    """Zeroes the ``ceil(min_sparsity * k)`` smallest of the k singular values of every matrix."""

    def shrink(self, values_K: Tensor, threshold: Scale, fraction: float) -> Tensor:
        size = values_K.shape[-1]
        kept = size - removed_count(fraction, size)
        return values_K * (torch.arange(size, device=values_K.device) < kept)
