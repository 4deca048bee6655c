"""Proximal maps, where users of ``pat.prox`` look for them."""

from pruningawaretraining.proximal import (
    GlobalMinSparsityConstraint,
    MinRankConstraint,
    MinSparsityConstraint,
    NMSparseConstraint,
    ProxGroupLasso,
    ProxLasso,
    ProxNuclearNorm,
)

__all__ = [
    "GlobalMinSparsityConstraint",
    "MinRankConstraint",
    "MinSparsityConstraint",
    "NMSparseConstraint",
    "ProxGroupLasso",
    "ProxLasso",
    "ProxNuclearNorm",
]
