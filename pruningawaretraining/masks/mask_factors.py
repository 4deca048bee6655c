"""Masks as factors of weights: spelled out or not, where and as the weights are stored now.

Shape suffixes: ``_W`` any weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import Variable

from pruningawaretraining.distributed.fsdp import local_of

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
        self._distinct = list({id(one): one for one in parameters}.values())
        self._signature: list[Signature] | None = None
        self._runs: list[tuple[list[Tensor], list[Tensor]]] = []
        self._of: dict[int, list[Tensor]] = {}
        self._pending: set[int] = set()  # parameters whose gradients wait for the end of a backward pass
        self._task = -1  # that pass

    def __bool__(self) -> bool:
        return bool(self.parameters)

    def multiply(self) -> None:
        """Set masked weights to 0."""
        self._follow()
        for parameters, factors in self._runs:
            torch._foreach_mul_([local_of(one) for one in parameters], factors)

    def multiply_gradients(self, only: set[int] | None = None) -> None:
        """Set the gradients of masked weights to 0.

        Args:
            only: ids of the parameters that are meant; None for all.
        """
        self._follow()
        for parameters, factors in self._runs:
            both = zip(parameters, factors, strict=True)
            meant = ((one.grad, factor) for one, factor in both if only is None or id(one) in only)
            dense = [(one, factor) for one, factor in meant if one is not None and one.layout is torch.strided]
            if dense:
                torch._foreach_mul_([local_of(one) for one, _ in dense], [factor for _, factor in dense])

    def accumulated(self, parameter: Tensor) -> None:
        """A gradient has been accumulated: set its masked entries to 0, together with all others at the end of the
        backward pass. Processes that train together average gradients before that, so there it is done at once."""
        task = torch._C._current_graph_task_id()
        if task == -1 or (torch.distributed.is_available() and torch.distributed.is_initialized()):
            self._multiply_at_once(parameter)
            return
        if task != self._task:
            self._task = task
            Variable._execution_engine.queue_callback(self.settle)
        self._pending.add(id(parameter))

    def _multiply_at_once(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None or gradient.layout is not torch.strided:
            return
        gradient = local_of(gradient)
        factors = self._of.get(id(parameter), [])
        if not factors or factors[0].device != gradient.device or factors[0].dtype is not gradient.dtype:
            self._follow()
            factors = self._of[id(parameter)]
        for factor in factors:
            gradient.mul_(factor.to(gradient.device, gradient.dtype))

    @torch.no_grad()
    def settle(self) -> None:
        """Do what is left for the end of the backward pass: it ends, or gradients are used before."""
        if self._pending:
            pending, self._pending = self._pending, set()
            self.multiply_gradients(pending)

    def _follow(self) -> None:
        """Bring the factors to where and how the parameters are stored now."""
        signature = [(one.device, one.dtype, one.stride()) for one in self._distinct]
        if signature == self._signature:
            return
        self._signature, of = signature, self._of
        of.clear()
        parameter_of = {id(one): one for one in self._distinct}
        for parameter, factor in zip(self.parameters, self.factors, strict=True):
            of.setdefault(id(parameter), []).append(factor.to(parameter.device, parameter.dtype))
        runs: dict[tuple[torch.device, torch.dtype, bool], tuple[list[Tensor], list[Tensor]]] = {}
        for key, factors in of.items():
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
