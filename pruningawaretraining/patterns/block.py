"""Blocks, N:M and single weights.

Convolution weights [O, I, kh, kw] are read as matrices [O, kh kw I], channels last; linear ones are [O, I] already.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from pruningawaretraining.config.options import TILES, Support
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.patterns.elements import (
    LAYER_TYPES,
    Labels,
    LayerWeight,
    blocks,
    build_grouping,
    each,
    layer_weights,
    whole,
)
from pruningawaretraining.registry import register, spelling

logger = logging.getLogger(__name__)


def _check_whole(key: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{key}: {value!r} must be a whole number of {least} or more")


@register("pattern", "block", "nxm")
@dataclass(frozen=True)
class Block:
    """Blocks of ``rows`` output channels by ``columns`` inputs.

    A block stops at the end of its layer (the last one is padded), and in a convolution at the end of a kernel position
    unless it holds whole positions or rows of the kernel. Written "4x1", "channelx1" (all rows) or "1xchannel".

    Args:
        rows: output channels in a block; 0 for all.
        columns: inputs in a block, along the matrix that the weight is read as; 0 for all.
        types: parts of the names of the layers' classes.
        spare_last: leave out the last linear layer where no layers are named.
    """

    support: ClassVar[Support] = TILES

    rows: int = 4
    columns: int = 1
    types: tuple[str, ...] = LAYER_TYPES
    spare_last: bool = False

    def __post_init__(self) -> None:
        _check_whole("rows", self.rows, 0)
        _check_whole("columns", self.columns, 0)

    @property
    def tile(self) -> tuple[int, int]:
        """(output channels, inputs) of a block; 0 for all."""
        return self.rows, self.columns

    def build(self, model: nn.Module, layers: Sequence[str] | None = None, exclude: Sequence[str] = ()) -> Grouping:
        """Label the weights of a model.

        Args:
            model: the model.
            layers: the layers; None for every layer of ``types``.
            exclude: layers to leave out.

        Raises:
            ConfigError: a name that is not a layer of the model.
            ModelError: nothing is selected.
        """
        weights = layer_weights(model, layers, exclude, self.types, self.spare_last)
        padded = [weight.name for weight in weights if self._is_padded(weight)]
        if padded:
            shown = ", ".join(padded[:8]) + (", ..." if len(padded) > 8 else "")
            logger.info(
                "%dx%d: the last blocks are padded in %d layers: %s", self.rows, self.columns, len(padded), shown
            )
        return build_grouping("block", weights, self._labels)

    def _is_padded(self, weight: LayerWeight) -> bool:
        shape = weight.parameter.shape
        inputs = shape[weight.in_dim]
        beyond = self.columns % inputs if self.columns > inputs else inputs % max(1, self.columns)
        return bool(self.rows and shape[weight.out_dim] % self.rows) or bool(self.columns and beyond)

    def _labels(self, weight: LayerWeight) -> list[Labels]:
        shape = weight.parameter.shape
        labels = [whole(length) for length in shape]
        if self.rows:
            labels[weight.out_dim] = blocks(shape[weight.out_dim], self.rows)
        if self.columns:
            labels[weight.in_dim] = blocks(shape[weight.in_dim], self.columns)
            positions = max(1, self.columns // shape[weight.in_dim])  # whole kernel positions in a block
            for dim in reversed(weight.kernel_dims):
                labels[dim] = blocks(shape[dim], positions)
                positions = positions // shape[dim] if positions % shape[dim] == 0 else 1
        return labels


@register("pattern", "unstructured", "element")
@dataclass(frozen=True)
class Unstructured:
    """Every weight by itself.

    Args:
        types: parts of the names of the layers' classes.
        spare_last: leave out the last linear layer where no layers are named.
    """

    support: ClassVar[Support] = TILES
    tile: ClassVar[tuple[int, int]] = (1, 1)

    types: tuple[str, ...] = LAYER_TYPES
    spare_last: bool = False

    def build(self, model: nn.Module, layers: Sequence[str] | None = None, exclude: Sequence[str] = ()) -> Grouping:
        """Label the weights of a model; see :meth:`Block.build`."""
        weights = layer_weights(model, layers, exclude, self.types, self.spare_last)
        return build_grouping("unstructured", weights, _each_weight)


@register("pattern", "n_of_m", "n:m")
@dataclass(frozen=True)
class NofM:
    """N of every M consecutive weights along the input channels are pruned; 2:4 keeps 2. Written "2:4".

    Groups are single weights; :func:`pruningawaretraining.allocation.windows.allocate_windows` chooses among them. A
    last window that is short keeps as many as the others.

    Args:
        drop: N, how many go.
        of: M, the length of a window.
        types: parts of the names of the layers' classes.
        spare_last: leave out the last linear layer where no layers are named.
    """

    support: ClassVar[Support] = TILES
    tile: ClassVar[tuple[int, int]] = (1, 1)

    drop: int = 2
    of: int = 4
    types: tuple[str, ...] = LAYER_TYPES
    spare_last: bool = False

    def __post_init__(self) -> None:
        _check_whole("drop", self.drop, 1)
        _check_whole("of", self.of, 2)
        if self.drop >= self.of:
            raise ValueError(f"drop: {self.drop} of {self.of} leaves nothing. Allowed: 1 to {self.of - 1}")

    @property
    def window(self) -> tuple[int, int]:
        """(pruned weights, window size)."""
        return self.drop, self.of

    def build(self, model: nn.Module, layers: Sequence[str] | None = None, exclude: Sequence[str] = ()) -> Grouping:
        """Label the weights of a model; see :meth:`Block.build`."""
        weights = layer_weights(model, layers, exclude, self.types, self.spare_last)
        return build_grouping("n_of_m", weights, self._labels)

    def _labels(self, weight: LayerWeight) -> list[Labels] | str:
        inputs = weight.parameter.shape[weight.in_dim]
        if inputs <= self.of - self.drop:
            return f"its {inputs} inputs are no more than the {self.of - self.drop} that a window keeps"
        if inputs % self.of:
            logger.info(
                "%s: its %d inputs do not divide by %d; the last window is padded", weight.name, inputs, self.of
            )
        return _each_weight(weight)


def _each_weight(weight: LayerWeight) -> list[Labels]:
    return [each(length) for length in weight.parameter.shape]


@spelling("pattern", r"(\d+|channel)x(\d+|channel)")
def parse_block(match: re.Match[str]) -> Mapping[str, Any]:
    """ "4x1" is a block, "1x1" a single weight, and "channel" stands for all of a dimension."""
    rows, columns = (0 if text == "channel" else int(text) for text in match.groups())
    if (rows, columns) == (1, 1):
        return {"type": "unstructured"}
    for text, number in zip(match.groups(), (rows, columns), strict=True):
        if text != "channel" and number == 0:
            raise ConfigError(f"pattern: {match.group()!r} has a block of 0. Allowed: 1 or more, or 'channel'")
    return {"type": "block", "rows": rows, "columns": columns}


@spelling("pattern", r"(\d+):(\d+)")
def parse_window(match: re.Match[str]) -> Mapping[str, Any]:
    """ "2:4": 2 of 4 go."""
    return {"type": "n_of_m", "drop": int(match.group(1)), "of": int(match.group(2))}
