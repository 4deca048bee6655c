"""Masks as factors of weights: spelled out or not, where and as the weights are stored now.

Shape suffixes: ``_W`` any weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pruningawaretraining.sharded import local_of

SPELLED = 1 << 22
"""Off the CPU the masks of a parameter with at most so many elements become one factor of its shape, and a few launches
then multiply all of them. For larger ones a launch does not count, and memory does."""

Signature = tuple[torch.device, torch.dtype, tuple[int, ...]]


class MaskFactors:
    """Factors of parameters, 0 for what is masked and 1 for the rest.

    They follow parameters that are moved to another device, dtype or memory format, at their next use.

    Args:
        parameters: a parameter for each factor; one with several masks is there several times.
        factors: each broadcasts to its parameter, or to this process's part of it.
    """

    def __init__(self, parameters: Sequence[Tensor] = (), factors: Sequence[Tensor] = ()) -> None:
        self.parameters, self.factors = list(parameters), list(factors)
        self._signature: list[Signature] | None = None
        self._runs: list[tuple[list[Tensor], list[Tensor]]] = []
        self._of: dict[int, list[Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self.parameters)

    def multiply(self) -> None:
        """Set masked weights to 0."""
        self._follow()
        for parameters, factors in self._runs:
            torch._foreach_mul_([local_of(one) for one in parameters], factors)

    def multiply_gradients(self) -> None:
        """Set the gradients of masked weights to 0."""
        self._follow()
        for parameters, factors in self._runs:
            both = zip(parameters, factors, strict=True)
            pairs = [(local_of(one.grad), factor) for one, factor in both if one.grad is not None]
            if pairs:
                torch._foreach_mul_([gradient for gradient, _ in pairs], [factor for _, factor in pairs])

    def multiply_one(self, parameter: Tensor, values_W: Tensor) -> None:
        """Set the masked entries of a tensor that is shaped like a parameter (or this process's part of it) to 0."""
        factors = self._of.get(id(parameter))
        if factors is None or factors[0].device != values_W.device or factors[0].dtype is not values_W.dtype:
            self._follow()
            factors = self._of[id(parameter)]
        for factor in factors:
            values_W.mul_(factor.to(values_W.device, values_W.dtype))

    def _follow(self) -> None:
        """Bring the factors to where and how the parameters are stored now."""
        signature = [(one.device, one.dtype, one.stride()) for one in self.parameters]
        if signature == self._signature:
            return
        self._signature, self._of = signature, {}
        parameter_of = {id(one): one for one in self.parameters}
        for parameter, factor in zip(self.parameters, self.factors, strict=True):
            self._of.setdefault(id(parameter), []).append(factor.to(parameter.device, parameter.dtype))
        runs: dict[tuple[torch.device, torch.dtype, bool], tuple[list[Tensor], list[Tensor]]] = {}
        for key, factors in self._of.items():
            parameter = parameter_of[key]
            spelled = parameter.device.type != "cpu" and local_of(parameter).numel() <= SPELLED
            if spelled:
                factors[:] = [_product(parameter, factors)]
            run = runs.setdefault((parameter.device, parameter.dtype, spelled), ([], []))
            run[0].extend([parameter] * len(factors))
            run[1].extend(factors)
        self._runs = list(runs.values())


def _product(parameter: Tensor, factors: Iterable[Tensor]) -> Tensor:
    """One factor of the shape of this process's part of a parameter, stored as that is."""
    product_W = torch.ones_like(local_of(parameter))
    for factor in factors:
        product_W.mul_(factor)
    return product_W
