"""Groupers of the proximal optimizer, where users of ``pat.group`` look for them."""

from pruningawaretraining.proximal import (
    AttentionHeadGrouperDim0,
    AttentionHeadGrouperDim1,
    ConvFilterGrouper,
    CoupledChannelGrouper,
    Dim0Grouper,
    Dim1Grouper,
    ElemGrouper,
    Grouper,
    KElementGrouper,
    LayerGrouper,
    PackedSVDGrouper,
    SVDGrouper,
)

__all__ = [
    "AttentionHeadGrouperDim0",
    "AttentionHeadGrouperDim1",
    "ConvFilterGrouper",
    "CoupledChannelGrouper",
    "Dim0Grouper",
    "Dim1Grouper",
    "ElemGrouper",
    "Grouper",
    "KElementGrouper",
    "LayerGrouper",
    "PackedSVDGrouper",
    "SVDGrouper",
]
