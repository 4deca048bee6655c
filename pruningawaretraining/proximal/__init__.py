"""The proximal optimizer (PAT): groupers, proximal maps, and :class:`PruneOptimizer` around any optimizer."""

from pruningawaretraining.proximal.attention import AttentionHeadGrouperDim0, AttentionHeadGrouperDim1, head_grouping
from pruningawaretraining.proximal.controller import LambdaController
from pruningawaretraining.proximal.coupled import CoupledChannelGrouper, CoupledGrouper
from pruningawaretraining.proximal.groupers import (
    ConvFilterGrouper,
    Dim0Grouper,
    Dim1Grouper,
    ElemGrouper,
    Grouper,
    GroupView,
    KElementGrouper,
    LayerGrouper,
)
from pruningawaretraining.proximal.low_rank import Factors, PackedSVDGrouper, SVDGrouper
from pruningawaretraining.proximal.maps import (
    GlobalMinSparsityConstraint,
    MinRankConstraint,
    MinSparsityConstraint,
    NMSparseConstraint,
    ProxGroupLasso,
    ProxLasso,
    ProxNuclearNorm,
)
from pruningawaretraining.proximal.optimizer import PruneOptimizer

__all__ = [
    "AttentionHeadGrouperDim0",
    "AttentionHeadGrouperDim1",
    "ConvFilterGrouper",
    "CoupledChannelGrouper",
    "CoupledGrouper",
    "Dim0Grouper",
    "Dim1Grouper",
    "ElemGrouper",
    "Factors",
    "GlobalMinSparsityConstraint",
    "GroupView",
    "Grouper",
    "KElementGrouper",
    "LambdaController",
    "LayerGrouper",
    "MinRankConstraint",
    "MinSparsityConstraint",
    "NMSparseConstraint",
    "PackedSVDGrouper",
    "ProxGroupLasso",
    "ProxLasso",
    "ProxNuclearNorm",
    "PruneOptimizer",
    "SVDGrouper",
    "head_grouping",
]
