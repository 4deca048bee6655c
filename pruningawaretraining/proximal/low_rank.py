"""Low rank: groupers whose groups are singular values, and the factors that are left in the end.

Shape suffixes: ``_W`` any weight, ``_BMN`` matrices of M rows and N columns in B packs, ``_BK`` their singular values.

This is the one thing that is not a labelling of elements, so it stays here and goes no further.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruningawaretraining.errors import ConfigError
from pruningawaretraining.proximal.groupers import split_dim
from pruningawaretraining.proximal.maps import Scale, SpectralMap
from pruningawaretraining.registry import register


class SpectralGrouper(ABC):
    """A grouper of singular values."""

    @abstractmethod
    def check(self, shape: Sequence[int], where: str) -> None:
        """Raise :class:`ConfigError` if a weight of this shape cannot be decomposed."""

    @abstractmethod
    def matrices(self, weight_W: Tensor) -> Tensor:
        """The weight as matrices ``_BMN``."""

    @abstractmethod
    def write(self, matrices_BMN: Tensor, weight_W: Tensor) -> None:
        """Put matrices back into a weight."""


@register("grouper", "SVDGrouper", "svdgrouper")
@dataclass(frozen=True)
class SVDGrouper(SpectralGrouper):
    """The singular values of a weight, flattened to a matrix of ``shape[0]`` rows."""

    def check(self, shape: Sequence[int], where: str) -> None:
        if sum(size > 1 for size in shape) < 2:
            raise ConfigError(f"{where}: SVDGrouper needs a matrix or more dimensions, got shape {tuple(shape)}")

    def matrices(self, weight_W: Tensor) -> Tensor:
        rows = next(dim for dim, size in enumerate(weight_W.shape) if size > 1)
        return weight_W.reshape(1, weight_W.shape[rows], -1)

    def write(self, matrices_BMN: Tensor, weight_W: Tensor) -> None:
        weight_W.copy_(matrices_BMN.reshape(weight_W.shape))


@register("grouper", "PackedSVDGrouper", "packedsvdgrouper")
@dataclass(frozen=True)
class PackedSVDGrouper(SpectralGrouper):
    """The singular values of each of ``npack`` matrices packed in one, such as query, key and value.

    Args:
        npack: how many there are, of equal size.
        pack_dim: 0 where they lie one below the other, 1 where they lie side by side.

    Raises:
        ConfigError: a number that is not allowed.
    """

    npack: int
    pack_dim: int = 0

    def __post_init__(self) -> None:
        if self.npack < 1:
            raise ConfigError(f"npack: {self.npack} is not allowed. Allowed: a whole number of 1 or more")
        if self.pack_dim not in (0, 1):
            raise ConfigError(f"pack_dim: {self.pack_dim} is not allowed. Allowed: 0, 1")

    def check(self, shape: Sequence[int], where: str) -> None:
        if len(shape) != 2 or shape[self.pack_dim] % self.npack:
            raise ConfigError(
                f"{where}: npack={self.npack} needs a matrix whose dimension {self.pack_dim} it divides, "
                f"got shape {tuple(shape)}"
            )

    def matrices(self, weight_W: Tensor) -> Tensor:
        sizes = (self.npack, weight_W.shape[self.pack_dim] // self.npack)
        return split_dim(weight_W, self.pack_dim, sizes).movedim(self.pack_dim, 0)

    def write(self, matrices_BMN: Tensor, weight_W: Tensor) -> None:
        self.matrices(weight_W).copy_(matrices_BMN)


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Matrices as ``U diag(S) V``: ``U`` (B, M, K), ``S`` (B, K) with the largest first, ``Vh`` (B, K, N)."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    @classmethod
    def of(cls, matrices_BMN: Tensor) -> Decomposition:
        """Decompose; half precision is computed in float32."""
        if matrices_BMN.dtype in (torch.bfloat16, torch.float16):
            matrices_BMN = matrices_BMN.float()
        return cls(*torch.linalg.svd(matrices_BMN, full_matrices=False))

    def product(self, values_BK: Tensor) -> Tensor:
        """The matrices with other singular values."""
        return (self.U * values_BK.unsqueeze(-2)) @ self.Vh


@dataclass(frozen=True, eq=False)
class Factors:
    """One matrix in factored form, ``U @ diag(S) @ Vh``.

    Args:
        U: (M, rank).
        S: (rank,), largest first, none of them 0.
        Vh: (rank, N).
    """

    U: Tensor
    S: Tensor
    Vh: Tensor

    @property
    def rank(self) -> int:
        return len(self.S)

    @property
    def size(self) -> int:
        """Size of both factors, the singular values multiplied into one of them."""
        return self.rank * (self.U.shape[0] + self.Vh.shape[1])

    @property
    def matrix(self) -> Tensor:
        return (self.U * self.S) @ self.Vh


def thresholds(slope: float, size: int, like: Tensor) -> Tensor:
    """``linspace(1 - slope, 1 + slope, size) / 2``, at least 0: what ``gamma_index_slope`` multiplies thresholds by."""
    return torch.linspace(1 - slope, 1 + slope, size, dtype=like.dtype, device=like.device).div_(2.0).clamp_(min=0.0)


def shrunk_values(prox: SpectralMap, values_BK: Tensor, scale: Scale, slope: float, fraction: float) -> Tensor:
    """Singular values after the map."""
    threshold = scale * thresholds(slope, values_BK.shape[-1], values_BK) if slope else scale
    return prox.shrink(values_BK, threshold, fraction)


def factors_of(found: Decomposition, values_BK: Tensor) -> list[Factors]:
    """The factors of each matrix, without those whose singular value is 0."""
    kept = []
    for U, S, Vh in zip(found.U, values_BK, found.Vh, strict=True):
        left = S != 0
        kept.append(Factors(U[:, left], S[left], Vh[left]))
    return kept
