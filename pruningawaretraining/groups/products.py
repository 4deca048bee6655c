"""Products that modules sum in their own code, for costs.

Shape suffixes: ``_N`` channels, ``_G1`` groups and one more for "outside".
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Product:
    """Products that a module sums in its own code, such as an einsum with a raw parameter.

    Args:
        layer: the module.
        macs: how many there are.
        out_N, in_N: the group of each channel that they make, and of each that they sum over; None for none.
    """

    layer: str
    macs: int
    out_N: Tensor | None = None
    in_N: Tensor | None = None

    def renumbered(self, numbers_G1: Tensor) -> Product:
        """The same of other groups."""
        out_N, in_N = (None if part is None else numbers_G1[part] for part in (self.out_N, self.in_N))
        return Product(self.layer, self.macs, out_N, in_N)
