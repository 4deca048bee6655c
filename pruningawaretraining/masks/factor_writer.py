"""Masks of coupled groups: each parameter is multiplied with the factors of its rows and columns.

Shape suffixes: ``_G`` groups, ``_W`` any weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import Variable

from pruningawaretraining.distributed.fsdp import local_of, part_of
from pruningawaretraining.groups.grouping import Grouping, Member
from pruningawaretraining.masks.restoring import restored

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

    def multiply(self, only: set[int] | None = None) -> None:
        """Set masked weights to 0: of the parameters with these ids, or of all."""
        self._follow()
        for parameters, factors in self._runs:
            pairs = zip(parameters, factors, strict=True)
            meant = [(local_of(one), factor) for one, factor in pairs if only is None or id(one) in only]
            if meant:
                torch._foreach_mul_([one for one, _ in meant], [factor for _, factor in meant])

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


class FactorWriter:
    """Multiplies parameters with factors that broadcast to them, 0 for what is masked and 1 for the rest.

    Args:
        grouping: the groups; one tensor may be in it several times (rows and columns).
    """

    device = torch.device("cpu")

    def __init__(self, grouping: Grouping) -> None:
        self.grouping = grouping
        self._factors = MaskFactors()

    def build(self, keep_G: Tensor, kept_by_set: list[int]) -> None:
        """See :class:`~pruningawaretraining.masks.masks.Writer`."""
        self._factors = MaskFactors()
        if bool(keep_G.all()):
            return
        parameters, factors = [], []
        for member, keep_W in self.grouping.expand(keep_G.float(), outside=1.0):
            if bool((keep_W == 0).any()):
                parameters.append(member.parameter)
                factors.append(_for_multiplication(member, keep_W))
        self._factors = MaskFactors(parameters, factors)

    def parameters(self) -> list[Tensor]:
        """See :class:`~pruningawaretraining.masks.masks.Writer`."""
        return list({id(one): one for one in self._factors.parameters}.values())

    def clear_weights(self, only: set[int] | None = None) -> None:
        """See :class:`~pruningawaretraining.masks.masks.Writer`."""
        self._factors.multiply(only)

    def restore(self) -> dict[int, int]:
        """See :class:`~pruningawaretraining.masks.masks.Writer`."""
        return restored(self.factors)

    def clear_gradients(self, only: set[int] | None = None) -> None:
        """See :class:`~pruningawaretraining.masks.masks.Writer`."""
        self._factors.multiply_gradients(only)

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


def _for_multiplication(member: Member, keep_W: Tensor) -> Tensor:
    """The mask in the weight's dtype, shaped so that the multiplication's inner loops are long."""
    shape = list(keep_W.shape)
    if len(shape) > 2 and shape[0] == 1:  # input columns of a convolution: spell out the kernel
        shape[2:] = member.parameter.shape[2:]
    keep_W = keep_W.to(member.parameter.device, member.parameter.dtype).expand(shape)
    return part_of(member.parameter, keep_W).contiguous()
