"""Coupled channels as data: channel spaces of layers, and the components that couple them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

Indices = np.ndarray

# Operations after which a channel index no longer means the same channel, or all channels are mixed.
MIXING_OPERATIONS = {
    "bmm": "a batched matrix product (attention)",
    "scaleddotproduct": "scaled dot product attention",
    "softmax": "a softmax",
    "flip": "a flip",
    "shuffle": "a channel or pixel shuffle",
    "glu": "a gated linear unit",
    "gather": "a gather",
    "indexselect": "an index selection",
    "im2col": "an unfold",
    "col2im": "a fold",
    "unfold": "an unfold",
    "cumsum": "a cumulative sum",
    "sort": "a sort",
    "fft": "a Fourier transform",
}
TRACE_LIMIT = 60.0
"""Seconds."""


@dataclass(eq=False)
class Space:
    """The channel indices at one side of a node.

    Args:
        owner: the layer, raw parameter or buffer, None for an operation.
        name: its name in the model, "" for an operation.
        side: "out", "in", or "both" for layers that keep their channels (norms, depthwise convolutions).
        width: how many channels it has, or None where only the graph tells.
        problem: why channels that reach it cannot be removed, "" if they can.
    """

    owner: nn.Module | Tensor | None
    name: str
    side: str
    width: int | None
    problem: str = ""
    dim: int = -1

    def __post_init__(self) -> None:
        self.first = -1  # number of its first element
        self.seen = np.zeros(self.width or 0, dtype=bool)


@dataclass(frozen=True, eq=False)
class WorkOf:
    """Products that a module sums in its own code.

    Args:
        layer: the module.
        macs: how many there are.
        outputs, inputs: the components of each dimension that stays, and of each that is summed over.
        where: the layer and line, for messages.
    """

    layer: str
    macs: int
    outputs: tuple[Indices, ...]
    inputs: tuple[Indices, ...]
    where: str = ""


@dataclass(frozen=True, eq=False)
class DependencyMap:
    """The coupled channels of a model.

    Args:
        spaces: channel spaces of layers and raw parameters.
        components: for each space, the component of each of its channels.
        blocked: component -> why none of its channels can be removed.
        norms: module that mixes channels, such as a norm written by hand -> the component of each of its channels.
        widths: (module, attribute that counts channels) -> the component of each of them.
        works: products outside of convolutions and linear layers.
        reductions: place of reductions in a module's code -> the component of each of the channels; see
            :meth:`pruningawaretraining.models.reduction_sites.Site.within`.
    """

    spaces: tuple[Space, ...]
    components: tuple[Indices, ...]
    blocked: dict[int, str]
    norms: dict[str, Indices] = field(default_factory=dict)
    widths: dict[tuple[str, str], Indices] = field(default_factory=dict)
    works: tuple[WorkOf, ...] = ()
    reductions: dict[str, Indices] = field(default_factory=dict)


class Deadline:
    """Time limit of the graph."""

    def __init__(self, limit: float) -> None:
        self.limit, self.end = limit, time.monotonic() + limit

    @property
    def passed(self) -> bool:
        return time.monotonic() > self.end

    @property
    def reason(self) -> str:
        return f"a part of the graph that was not done within {self.limit:g} s (trace_limit)"


def has_multiplier(module: Any) -> bool:
    """Whether a convolution is depthwise with more outputs than inputs."""
    return (
        isinstance(module, nn.modules.conv._ConvNd)
        and not module.transposed
        and module.groups == module.in_channels > 1
        and module.out_channels > module.in_channels
    )


def ties(space: Space) -> tuple[Indices, Indices]:
    """Channels that must be pruned together: equal positions in every group of a grouped convolution or GroupNorm."""
    groups, module = 1, space.owner
    if isinstance(module, nn.GroupNorm):
        groups = module.num_groups
    elif isinstance(module, nn.modules.conv._ConvNd) and space.side != "both" and not has_multiplier(module):
        groups = module.groups
    if groups == 1 or not space.width:
        return np.zeros(0, int), np.zeros(0, int)
    channels = np.arange(space.width)
    return channels, channels % (space.width // groups)
