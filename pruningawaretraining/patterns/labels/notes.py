"""Notes of a follower beside slots: operations over channels, widths that code states, products of its own."""

from __future__ import annotations

from dataclasses import dataclass

from pruningawaretraining.models.reduction_sites import Site
from pruningawaretraining.patterns.labels.slots import Array


@dataclass(frozen=True, eq=False)
class Mixing:
    """An operation over channels, such as a mean: it computes something else when channels go.

    Args:
        layer: the module in whose code it is ("" for the model itself).
        slots: of the channels.
        what, where: the operation, and the layer and line, for messages.
        site: in which module's code, and which of the calls there, it is; None if that is not known.
    """

    layer: str
    slots: Array
    what: str
    where: str
    site: tuple[str, Site] | None = None


@dataclass(frozen=True, eq=False)
class Size:
    """A width that code may take from an attribute: pieces of a split, the last dimension of a view.

    Args:
        layer: the module in whose code it is.
        size: the width.
        slots: of the entries that it counts.
    """

    layer: str
    size: int
    slots: Array


@dataclass(frozen=True, eq=False)
class Work:
    """Products that are summed outside of the layers that PyTorch has for it, such as an einsum with a raw parameter.

    Args:
        layer: the module in whose code they are.
        macs: how many there are.
        outputs, inputs: slots of each free dimension, and of each that is summed over.
        where: the layer and line, for messages.
    """

    layer: str
    macs: int
    outputs: tuple[Array, ...]
    inputs: tuple[Array, ...]
    where: str
