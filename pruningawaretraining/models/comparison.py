"""Compare the outputs of two states of a model, and tell rounding from a real difference.

Masked and removed, a model is the same function, but not the same arithmetic: kernels are chosen by shape, GPUs compute
float32 in TF32 or not, half precision rounds every layer, and activations near 1 may cancel to outputs of 1e-4. So no
tolerance in the model's own dtype is both wide enough for rounding and narrow enough for a mistake. Instead:

1. Both states are computed in float64 (:func:`~pruningawaretraining.models.precision.in_float64`), which knows no TF32
   and no autocast. Outputs that agree to ``EXACT`` of their largest value are the same. This is the ordinary case; it
   costs one pass for each state, as a comparison in the own dtype would, and copies of the weights for as long as it
   runs; a dry run removes from and masks one set of copies (:meth:`Comparison.in_float64`). (A first look in the own
   dtype would save little and could let a mistake through that is as small as rounding.)
2. A model that cannot run in float64 (code that fixes its dtype, kernels that lack it, sharded or quantized weights, a
   device without it, too little memory) is computed in the model's own dtype, without TF32 where that can be chosen.
3. Where outputs differ, it is measured on the same model how far rounding moves them: every operation sees its operands
   a little off (:class:`~pruningawaretraining.models.precision.Rounding`), for several seeds, and the model is run
   again as it is. A difference within ``MARGIN`` of the largest of these is rounding. Where rounding moves the outputs
   by half of their size, or they are not finite, all 0 or constant, they say nothing.

Inputs are random ones like the example (:func:`~pruningawaretraining.models.probes.probes_of`), so that an example of
zeros hides nothing; a model that rejects these gets the example. Every pass starts from the same seeds, and a model
that draws random numbers computes with constants in their place (:class:`~pruningawaretraining.models.chance.Still`).
Where two passes of other seeds differ all the same, only shapes can be compared.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.errors import ModelError
from pruningawaretraining.models.calling import REJECTED, ForwardFn, call_as_is, full_precision, outputs_of
from pruningawaretraining.models.chance import Still, has_drawn, same_draws, seed
from pruningawaretraining.models.exported_graph import ExportedGraph
from pruningawaretraining.models.fake_quant import resting
from pruningawaretraining.models.precision import Rounding, in_float64, inputs_in_float64, strict_float32
from pruningawaretraining.models.probes import probes_of

logger = logging.getLogger(__name__)

EXACT = 1e-12
"""Difference in float64, as a fraction of the largest output, that needs no explanation."""
MARGIN = 4.0
"""How many times as far as they were seen to move outputs may be apart by rounding."""
SEEDS = 3


class NoFloat64(Exception):
    """A model that was to stay in float64 does not run there; the reason is the message."""


Within = AbstractContextManager[Any]
_AS_IT_IS: Within = nullcontext()


@dataclass(frozen=True)
class Outputs:
    """Outputs of a model.

    Attributes:
        tensors: its floating point outputs.
        exact: whether they were computed in float64.
    """

    tensors: list[Tensor]
    exact: bool


@dataclass(frozen=True)
class Verdict:
    """Result of comparing two states of a model.

    Attributes:
        difference: the largest, as a fraction of the largest output; 0 where rounding explains it.
        informative: whether any output told something: finite, not constant, and not moved about by rounding or chance.
    """

    difference: float
    informative: bool


class Comparison:
    """Compares states of one model, and of graphs exported from it, on its example inputs.

    The model runs in eval mode, without gradients, autocast and fake quantization; it, random generators and global
    settings are as before after every call.

    Args:
        model: the model.
        inputs, forward_fn: how to run it.
        graphs: exported from the model; their outputs are compared too.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        forward_fn: ForwardFn | None = None,
        graphs: Sequence[ExportedGraph] = (),
    ) -> None:
        self.model, self.forward_fn, self.graphs = model, forward_fn, graphs
        self.inputs, self._example = probes_of(inputs), inputs
        self.exact = True  # whether it can be computed in float64, as far as is known
        self.draws = False  # whether a forward pass draws random numbers, as far as is known
        self._has_run = False
        self._wide: bool | None = None  # whether that takes float64 as PyTorch's default dtype, once it is known
        self._stays = False  # whether the model is in float64 already, see `in_float64`

    @contextmanager
    def in_float64(self) -> Iterator[None]:
        """Inside the block the model is in float64: its weights are copied once for all of its outputs.

        Raises:
            NoFloat64: it cannot be, then before the block, or one of its outputs cannot be computed so.
        """
        with ExitStack() as stack:
            try:
                if not self.exact:
                    raise ModelError("the model does not run in float64")
                stack.enter_context(in_float64(self._models()))
            except REJECTED as error:
                raise NoFloat64(str(error)) from error
            self._stays = True
            try:
                yield
            finally:
                self._stays = False

    def _models(self) -> list[nn.Module]:
        return [self.model, *(one.graph for one in self.graphs)]

    def outputs(self) -> Outputs:
        """Outputs of the model as it is now, in float64 if possible.

        Raises:
            ModelError: it rejects the inputs.
        """
        with self._settings():
            try:
                found = self._outputs()
            except ModelError:
                if self._has_run or self.inputs is self._example:
                    raise
                self.inputs = self._example  # values other than these do not suit the model
                found = self._outputs()
            self._has_run = True
            return found

    def verdict(self, expected: Outputs, actual: Outputs) -> Verdict:
        """Compare two states, of which the model is in one now (either).

        Raises:
            ModelError: it rejects the inputs.
        """
        if len(expected.tensors) != len(actual.tensors):
            return Verdict(float("inf"), True)
        gaps = [gap_of(one, other) for one, other in zip(expected.tensors, actual.tensors, strict=True)]
        allowed = EXACT if expected.exact and actual.exact else 0.0
        told = [scale > 0 and not is_constant(one) for (_, scale), one in zip(gaps, expected.tensors, strict=True)]
        if all(gap <= allowed * scale for gap, scale in gaps):
            return Verdict(0.0, any(told))
        worst, informative = 0.0, False
        for (gap, scale), (moved, by_chance), tells in zip(gaps, self._movement(), told, strict=True):
            limit = max(MARGIN * moved, allowed * scale)
            chance = by_chance > limit and gap < float("inf")
            mistaken = gap > limit and not chance
            informative |= mistaken or (tells and not chance and limit < scale / 2)
            worst = max(worst, gap / max(scale, 1e-300)) if mistaken else worst
        if not informative:
            logger.warning(
                "the outputs on the example inputs move by chance or rounding alone: nothing can be compared but shapes"
            )
        return Verdict(worst, informative)

    @staticmethod
    def moved(before: Outputs, after: Outputs) -> bool:
        """Whether any output changed by more than rounding in float64 does."""
        gaps = (gap_of(one, other) for one, other in zip(before.tensors, after.tensors, strict=True))
        return any(gap > EXACT * scale for gap, scale in gaps)

    def _movement(self) -> list[tuple[float, float]]:
        """Movement of each output by rounding, and between seeds."""
        with self._settings():
            first = self._outputs().tensors
            runs = [self._outputs().tensors, *(self._outputs(Rounding(one)).tensors for one in range(SEEDS))]
            other = self._outputs(number=1).tensors
        return [
            (max(movement_of(one, run[number]) for run in runs), movement_of(one, other[number]))
            for number, one in enumerate(first)
        ]

    @contextmanager
    def _settings(self) -> Iterator[None]:
        """Same conditions for every run; random generators are restored."""
        with same_draws(self.model), full_precision(self.model), resting(self.model):
            yield

    def _outputs(self, within: Within = _AS_IT_IS, number: int = 0) -> Outputs:
        """Run the model once, within a mode, from the seeds of a number."""
        reason = ""
        for wide in self._widths():
            try:
                with _AS_IT_IS if self._stays else in_float64(self._models()), _default_float64(wide):
                    found = Outputs(self._run(inputs_in_float64(self.inputs), within, number), True)
            except REJECTED as error:
                reason = str(error)
            else:
                self._wide = wide
                return found
        if self._stays:
            raise NoFloat64(reason)
        own = self._own(within, number)  # raises if it was not float64 that the model could not do
        if self.exact:
            logger.debug("compared in the model's own dtype, not in float64: %s", reason)
        self.exact = False
        return own

    def _widths(self) -> tuple[bool, ...]:
        """Which default dtypes to try float64 with: code that makes constants makes them in the default one."""
        if not self.exact:
            return ()
        return (False, True) if self._wide is None else (self._wide,)

    def _own(self, within: Within, number: int) -> Outputs:
        with strict_float32():
            return Outputs(self._run(self.inputs, within, number), False)

    def _run(self, inputs: Any, within: Within, number: int) -> list[Tensor]:
        if not self.draws:
            found = self._once(inputs, within, number)
        if self.draws:
            found = self._once(inputs, within, number, Still())  # type: ignore[no-untyped-call]
        return found

    def _once(self, inputs: Any, within: Within, number: int, still: Within = _AS_IT_IS) -> list[Tensor]:
        seed(self.model, number)
        with within, still:  # draws of a mode itself are not stilled
            found = outputs_of(self.model, inputs, partial(self._called, number))
            for graph in self.graphs:
                found += graph.outputs(inputs, self.forward_fn)
        return found

    def _called(self, number: int, model: nn.Module, inputs: Any) -> Any:
        found = call_as_is(model, inputs, self.forward_fn)
        self.draws = self.draws or has_drawn(model, number)
        return found


@contextmanager
def _default_float64(wide: bool) -> Iterator[None]:
    """float64 as PyTorch's default dtype inside the block, if ``wide``."""
    before = torch.get_default_dtype()
    try:
        if wide:
            torch.set_default_dtype(torch.float64)
        yield
    finally:
        torch.set_default_dtype(before)


def gap_of(expected: Tensor, actual: Tensor) -> tuple[float, float]:
    """Largest absolute difference where ``expected`` is finite, and its largest value there.

    Infinite where shapes differ, or where only one of both is finite; outputs without values are (0, 0).
    """
    if expected.shape != actual.shape:
        return float("inf"), 0.0
    if expected.is_meta or not expected.numel():
        return 0.0, 0.0
    one, other = expected.detach().cpu().double(), actual.detach().cpu().double()
    finite = torch.isfinite(one)
    difference = torch.where(finite, (one - other).abs(), 0.0).nan_to_num(nan=float("inf"), posinf=float("inf"))
    difference = difference.masked_fill(~finite & torch.isfinite(other), float("inf"))
    scale = torch.where(finite, one.abs(), 0.0)
    return float(difference.max()), float(scale.max())


def movement_of(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference where both are finite; infinite where shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    both = torch.isfinite(one) & torch.isfinite(other)
    return gap_of(torch.where(both, one, 0.0), torch.where(both, other, 0.0))[0]


def is_constant(output: Tensor) -> bool:
    """Whether an output of several values has only one: it says nothing of what the model computes."""
    if output.is_meta or output.numel() < 2:
        return False
    return bool((output == output.reshape(-1)[0]).all())
