"""How a weight is laid out in blocks along the diagonal of its Fisher matrix.

Shape suffixes: ``_W`` the shape of the weight, ``_B`` blocks, ``_D`` the entries of a block, ``_T`` tiles of a block.

Unstructured weights are flattened row-major. Where tiles or N:M runs live or die together, the weight is laid out so
that each lies in one piece: outputs, kernel positions, inputs. Incomplete tiles and blocks are padded;
padded entries are 0, in no gradient, and never counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining.errors import ConfigError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.patterns.elements import LayerWeight

WIDEST = 4096
"""Largest block that is worth factoring; a tile must fit in one."""


class WeightPattern(Protocol):
    """A pattern inside a weight that the second-order criteria prune; one of N:M has its ``window`` as well."""

    @property
    def tile(self) -> tuple[int, int]:
        """(output channels, inputs) of a group; 0 for all."""

    @property
    def types(self) -> tuple[str, ...]:
        """Parts of the names of the layers' classes."""

    @property
    def spare_last(self) -> bool:
        """Whether the last linear layer is left out where no layers are named."""

    def build(self, model: nn.Module, layers: Sequence[str] | None = None, exclude: Sequence[str] = ()) -> Grouping:
        """Label the weights of a model."""


@dataclass(frozen=True)
class Tile:
    """The unit of pruning in one weight: ``rows`` output channels by ``cols`` inputs.

    Args:
        rows, cols: its size; tiles at the end of a dimension that it does not divide are smaller.
        whole: the inputs of a tile run over kernel positions too (``cols`` is then all of them).
        keep, of: at most ``keep`` of ``of`` consecutive tiles along the inputs stay; ``of`` = 0 for no such limit.
    """

    rows: int = 1
    cols: int = 1
    whole: bool = False
    keep: int = 0
    of: int = 0

    @property
    def most(self) -> float:
        """Largest fraction that can be pruned."""
        return 1 - self.keep / self.of if self.of else 1.0

    @classmethod
    def in_weight(cls, pattern: WeightPattern, weight: LayerWeight) -> Tile:
        """A pattern's tile in one weight.

        Raises:
            ConfigError: it spans several kernel positions, or is too large to be in one Fisher block.
        """
        if window := getattr(pattern, "window", None):
            drop, of = window
            return cls(keep=of - drop, of=of)
        tile_rows, columns = pattern.tile
        shape = weight.parameter.shape
        inputs = shape[weight.in_dim]
        if columns >= 2 * inputs and math.prod(shape[2:]) > 1:
            raise ConfigError(
                f"pattern.columns: {columns} spans several kernel positions of {weight.name!r}, which has "
                f"{inputs} inputs. Allowed for second-order criteria: less than {2 * inputs}, or 0 for all"
            )
        rows = tile_rows or shape[weight.out_dim]
        cols = min(columns, inputs) or inputs * math.prod(shape[2:])
        if rows * cols > WIDEST:
            raise ConfigError(
                f"pattern: a tile of {rows} x {cols} in {weight.name!r} is larger than a Fisher block can be. "
                f"Allowed: up to {WIDEST} weights in a tile"
            )
        return cls(rows, cols, columns == 0)


@dataclass(frozen=True)
class Layout:
    """The blocks of one weight.

    Args:
        shape: of the weight.
        out: its dimension of outputs (0, or 1 for transposed convolutions).
        tile: what lives or dies together.
        width: entries of a block; a multiple of the unit.
    """

    shape: tuple[int, ...]
    out: int
    tile: Tile
    width: int

    @classmethod
    def of(cls, weight: LayerWeight, pattern: WeightPattern, block_size: int) -> Layout:
        """The layout of a weight; the block size is rounded up to whole units, and never wider than needed."""
        plain = cls(tuple(weight.parameter.shape), weight.out_dim, Tile.in_weight(pattern, weight), 1)
        wanted = min(block_size, plain.length)
        return cls(plain.shape, plain.out, plain.tile, math.ceil(wanted / plain.unit) * plain.unit)

    @property
    def unit(self) -> int:
        """Entries that must not be split between blocks: a tile, or a run of M of them."""
        return self.group * max(1, self.tile.of)

    @property
    def group(self) -> int:
        """Entries of a tile."""
        return self.tile.rows * self.tile.cols

    @property
    def is_flat(self) -> bool:
        """Whether entries are in row-major order."""
        return self.unit == 1

    @cached_property
    def padded(self) -> tuple[int, int, int]:
        """Outputs, kernel positions and inputs, padded to whole tiles and runs."""
        outputs, inputs = self.shape[self.out], self.shape[1 - self.out]
        cols = self.tile.cols * max(1, self.tile.of)
        rows, kernel = self.tile.rows, math.prod(self.shape[2:])
        if self.tile.whole:
            return math.ceil(outputs / rows) * rows, kernel, inputs
        return math.ceil(outputs / rows) * rows, kernel, math.ceil(inputs / cols) * cols

    @cached_property
    def length(self) -> int:
        """Number of entries, with the padding of tiles and without the tail of the last block."""
        return math.prod(self.shape) if self.is_flat else math.prod(self.padded)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return math.ceil(self.length / self.width)

    @property
    def tiles(self) -> int:
        """Tiles of a block."""
        return self.width // self.group

    @cached_property
    def whole(self) -> bool:
        """Whether nothing is padded."""
        return self.blocks * self.width == math.prod(self.shape)

    def rows_of(self, values_W: Tensor) -> Tensor:
        """The weight as a matrix: a row of padded outputs, the columns kernel positions by padded inputs."""
        outputs, kernel, inputs = self.padded
        moved = values_W.movedim(self.out, 0)
        matrix = moved.reshape(*moved.shape[:2], kernel)
        missing = (0, 0, 0, inputs - matrix.shape[1], 0, outputs - matrix.shape[0])
        return functional.pad(matrix, missing).transpose(1, 2).reshape(outputs, kernel * inputs)

    def from_rows(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`rows_of`."""
        outputs, kernel, inputs = self.padded
        full = matrix.reshape(outputs, kernel, inputs).transpose(1, 2)
        full = full[: self.shape[self.out], : self.shape[1 - self.out]]
        kernel_shape = self.shape[2:]
        return full.reshape(*full.shape[:2], *kernel_shape).movedim(0, self.out)

    def to_blocks(self, values_W: Tensor) -> Tensor:
        """A tensor shaped like the weight as (blocks, width)."""
        if self.is_flat:
            flat = values_W.reshape(-1)
        else:
            rows, cols = self.tile.rows, self.tile.cols
            matrix = self.rows_of(values_W)
            tiles = matrix.reshape(matrix.shape[0] // rows, rows, matrix.shape[1] // cols, cols)
            flat = tiles.transpose(1, 2).reshape(-1)
        return functional.pad(flat, (0, self.blocks * self.width - self.length)).reshape(self.blocks, self.width)

    def from_blocks(self, blocks_BD: Tensor) -> Tensor:
        """The inverse of :meth:`to_blocks`: shaped like the weight."""
        flat = blocks_BD.reshape(-1)[: self.length]
        if self.is_flat:
            return flat.reshape(self.shape)
        rows, cols = self.tile.rows, self.tile.cols
        outputs, kernel, inputs = self.padded
        tiles = flat.reshape(outputs // rows, kernel * inputs // cols, rows, cols)
        return self.from_rows(tiles.transpose(1, 2).reshape(outputs, kernel * inputs))

    def valid(self, device: torch.device | None = None) -> Tensor:
        """True for entries of the weight, False for padding: bool (blocks, width)."""
        return self.to_blocks(torch.ones(self.shape, dtype=torch.bool, device=device))

    def tile_any(self, mask_BD: Tensor) -> Tensor:
        """Whether any entry of each tile is set: (blocks, tiles)."""
        return mask_BD.reshape(*mask_BD.shape[:-1], -1, self.group).any(-1)

    def spread(self, mask_BT: Tensor) -> Tensor:
        """A value for each tile as one for each entry: (blocks, width)."""
        return mask_BT.repeat_interleave(self.group, -1)
