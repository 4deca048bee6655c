"""Weights in a plan, and the precision of norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class WeightPair:
    """One weight in a plan.

    Args:
        source: what the map is applied to (the latent).
        target: where the result goes (the weight); the same tensor as the source to work in place.
        name: of the weight, for messages.
    """

    source: Tensor
    target: Tensor
    name: str = ""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Norms of half-precision weights are computed in float32."""
    return torch.float32 if dtype in HALF else dtype
