"""Masks of coupled groups: each parameter is multiplied with the factors of its rows and columns.

Shape suffixes: ``_G`` groups, ``_O`` output channels, ``_W`` any weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruningawaretraining.distributed.fsdp import is_sharded, part_of
from pruningawaretraining.groups import kernels as fused
from pruningawaretraining.groups.grouping import Grouping, Member
from pruningawaretraining.masks.mask_factors import MaskFactors


class FactorWriter:
    """Multiplies parameters with factors that broadcast to them, 0 for what is masked and 1 for the rest.

    Args:
        grouping: the groups; one tensor may be in it several times (rows and columns).
    """

    device = torch.device("cpu")

    def __init__(self, grouping: Grouping) -> None:
        self.grouping = grouping
        self._factors = MaskFactors()
        self._cleared: list[_Cleared] = []

    def build(self, keep_G: Tensor, kept_by_set: list[int]) -> None:
        """See :class:`~pruningawaretraining.masks.masks.Writer`."""
        self._factors, self._cleared = MaskFactors(), []
        if bool(keep_G.all()):
            return
        parameters, factors = [], []
        for member, keep_W in self.grouping.expand(keep_G.float(), outside=1.0):
            if bool((keep_W == 0).any()):
                parameters.append(member.parameter)
                factors.append(_for_multiplication(member, keep_W))
        self._factors = MaskFactors(parameters, factors)
        on_the_cpu = all(one.device.type == "cpu" and not is_sharded(one) for one in parameters)
        if on_the_cpu and fused.kernels() is not None:
            self._cleared = _cleared(parameters, factors)

    def parameters(self) -> list[Tensor]:
        """See :class:`~pruningawaretraining.masks.masks.Writer`."""
        return list({id(one): one for one in self._factors.parameters}.values())

    def clear_weights(self) -> None:
        """See :class:`~pruningawaretraining.masks.masks.Writer`."""
        kernels = fused.kernels()
        if kernels is not None and self._cleared and all(fused.fits(one.parameter) for one in self._cleared):
            for one in self._cleared:
                kernels.clear(fused.as_matrix(one.parameter.detach()), one.cleared_O, one.columns)
                torch.autograd.graph.increment_version(one.parameter)
            return
        self._factors.multiply()

    def clear_gradients(self) -> None:
        """See :class:`~pruningawaretraining.masks.masks.Writer`."""
        self._factors.multiply_gradients()

    def accumulated(self, parameter: Tensor) -> None:
        """See :class:`~pruningawaretraining.masks.masks.Writer`."""
        self._factors.accumulated(parameter)

    def settle(self) -> None:
        """See :class:`~pruningawaretraining.masks.masks.Writer`."""
        self._factors.settle()

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """See :class:`~pruningawaretraining.masks.masks.Writer`."""
        return list(zip(self._factors.parameters, self._factors.factors, strict=True))

    def masked_weights(self) -> int:
        """See :class:`~pruningawaretraining.masks.masks.Writer`."""
        kept: dict[int, Tensor] = {}
        for parameter, factor in self.factors():
            known = kept.get(id(parameter), torch.ones(()))
            kept[id(parameter)] = known * (factor != 0).cpu()
        return sum(one.numel() - round(float(kept[id(one)].expand(one.shape).sum())) for one in self.parameters())


@dataclass(frozen=True, eq=False)
class _Cleared:
    """The rows and columns of a parameter that are masked, as numpy arrays."""

    parameter: Tensor
    cleared_O: Any
    columns: Any


def _cleared(parameters: list[Tensor], factors: list[Tensor]) -> list[_Cleared]:
    """What to set to 0, one entry for each parameter; nothing if some mask is not one of rows or columns."""
    found: dict[int, tuple[Tensor, Tensor, list[Tensor]]] = {}
    for parameter, factor in zip(parameters, factors, strict=True):
        rows, columns = torch.zeros(len(parameter), dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
        masked = (factor == 0).cpu()
        if masked.numel() == len(parameter) == len(masked):
            rows = masked.reshape(-1)
        elif len(masked) == 1 and masked.numel() * len(parameter) == parameter.numel():
            columns = torch.nonzero(masked.reshape(-1)).flatten()
        else:
            return []
        _, known_rows, known_columns = found.setdefault(id(parameter), (parameter, torch.zeros_like(rows), []))
        known_rows |= rows
        known_columns.append(columns)
    return [_Cleared(one, rows.numpy(), torch.cat(columns).numpy()) for one, rows, columns in found.values()]


def _for_multiplication(member: Member, keep_W: Tensor) -> Tensor:
    """The mask in the weight's dtype, shaped so that the multiplication's inner loops are long."""
    shape = list(keep_W.shape)
    if len(shape) > 2 and shape[0] == 1:  # input columns of a convolution: spell out the kernel
        shape[2:] = member.parameter.shape[2:]
    keep_W = keep_W.to(member.parameter.device, member.parameter.dtype).expand(shape)
    return part_of(member.parameter, keep_W).contiguous()
