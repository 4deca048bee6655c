"""The weights that are pruned together, each with its layout and its masks so far.

Shape suffixes: ``_W`` the shape of a weight, ``_B`` blocks, ``_D`` entries of a block, ``_T`` tiles of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from pruningawaretraining.criteria.second_order.fisher import workplace
from pruningawaretraining.criteria.second_order.layout import Layout, WeightPattern
from pruningawaretraining.patterns.elements import LayerWeight, layer_weights


@dataclass(frozen=True, eq=False)
class PrunableWeight:
    """One weight.

    Args:
        source: the layer and its weight.
        layout: its blocks.
        keep_W: False where it is masked already; None if nothing is.
    """

    source: LayerWeight
    layout: Layout
    keep_W: Tensor | None = None

    @property
    def name(self) -> str:
        """Of its layer."""
        return self.source.name

    @property
    def module(self) -> nn.Module:
        """Its layer."""
        return self.source.layer

    @property
    def parameter(self) -> Tensor:
        return self.source.parameter

    @property
    def device(self) -> torch.device:
        """Device of the computation: the weight's own, unless it lacks float64."""
        return workplace(self.parameter.device)

    @cached_property
    def valid_BT(self) -> Tensor:
        """Tiles that are not all padding."""
        return self.layout.tile_any(self.layout.valid(self.device))

    @cached_property
    def alive_BD(self) -> Tensor:
        """Entries that are neither padding nor masked."""
        if self.keep_W is None:
            return self.layout.valid(self.device)
        return self.layout.to_blocks(self.keep_W.to(self.device))

    @cached_property
    def open_BT(self) -> Tensor:
        """Tiles with an entry that is alive."""
        return self.layout.tile_any(self.alive_BD)

    def blocks(self) -> Tensor:
        """The weight's values in blocks, masked ones 0, in float32 or wider."""
        values = self.parameter.detach()
        values = values if values.dtype == torch.float64 else values.float()
        return self.layout.to_blocks(values.to(self.device)) * self.alive_BD


def prunable_weights(
    model: nn.Module,
    pattern: WeightPattern,
    block_size: int,
    layers: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    keep: Mapping[str, Tensor] | None = None,
) -> list[PrunableWeight]:
    """The selected layers' weights, laid out for a pattern.

    Args:
        model: the model.
        pattern: what lives or dies together.
        block_size: entries of a Fisher block.
        layers, exclude: as in a rule.
        keep: layer -> mask so far (True = keep), shaped like the weight.

    Raises:
        ConfigError, ModelError: see :func:`pruningawaretraining.patterns.elements.layer_weights`.
    """
    masks = keep or {}
    return [
        PrunableWeight(source, Layout.of(source, pattern, block_size), masks.get(source.name))
        for source in layer_weights(model, layers, exclude, pattern.types, pattern.spare_last)
    ]
