"""Probes for comparing two states of a model: random inputs like the example, and weights at which every branch counts.

An example of zeros, or a branch that starts at zero (ReZero, LayerScale, a norm whose weight starts at zero), lets a
misunderstanding vanish until training has moved the weights. So a comparison uses neither the example's values nor, in
a dry run, the weights as they were initialised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.distributed.fsdp import is_sharded
from pruningawaretraining.models.fake_quant import is_converted

SMALL = 1e-2
"""A parameter none of whose values is larger than this fraction of what its shape suggests hardly counts."""

LOOKED_AT = 2
"""Rows of a parameter that are looked at first."""


def probes_of(inputs: Any) -> Any:
    """Random inputs of the example's nest, shapes, dtypes and ranges of values.

    Integers, truth values, single numbers, masks of zeros and ones, and tensors with values that are not finite stay as
    given: they mean something. A constant says nothing about a range: normal noise is added to it.

    Args:
        inputs: example inputs; see :func:`pruningawaretraining.models.calling.call`.
    """
    return _probed(inputs, torch.Generator().manual_seed(0))


def _probed(nest: Any, generator: torch.Generator) -> Any:
    if isinstance(nest, Tensor):
        return _probe(nest, generator) if _is_free(nest) else nest
    if isinstance(nest, Mapping) and type(nest) is dict:
        return {key: _probed(value, generator) for key, value in nest.items()}
    if type(nest) in (list, tuple):
        return type(nest)(_probed(value, generator) for value in nest)
    return nest


def _is_free(tensor: Tensor) -> bool:
    """Whether other values of the same range would do as well."""
    if not tensor.is_floating_point() or tensor.numel() < 2 or tensor.is_meta or is_sharded(tensor):
        return False
    if tensor.layout is not torch.strided or not bool(torch.isfinite(tensor).all()):
        return False
    switched = (tensor == 0) | (tensor == 1)
    return not (bool(switched.all()) and bool((tensor == 0).any()) and bool((tensor == 1).any()))


def _probe(tensor: Tensor, generator: torch.Generator) -> Tensor:
    low, high = float(tensor.min()), float(tensor.max())
    if low == high:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        values = low + noise * max(abs(low), 1.0)
    else:
        values = low + (high - low) * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    return values.to(tensor.device, tensor.dtype)


@contextmanager
def perturbed(model: nn.Module) -> Iterator[None]:
    """Inside the block every parameter counts: constant and tiny ones are random, as training may make them.

    Weights that are neither stay as they are. Afterwards every value is as it was.
    """
    generator = torch.Generator().manual_seed(1)
    chosen = {id(one): one for one in model.parameters() if _may_change(one) and _hardly_counts(one)}
    saved = [(one, one.detach().clone()) for one in chosen.values()]
    try:
        with torch.no_grad():
            for one, values in saved:
                one.copy_(_counting(values, generator))
        yield
    finally:
        with torch.no_grad():
            for one, values in saved:
                one.copy_(values)


def _may_change(one: Tensor) -> bool:
    special = one.is_meta or is_sharded(one) or is_converted(one)
    return one.is_floating_point() and one.numel() > 0 and not special and not one.is_inference()


def _hardly_counts(one: Tensor) -> bool:
    """Whether a parameter is constant along its first dimension or as a whole, or close to 0."""
    values = one.detach()
    first = values.reshape(len(values), -1) if values.dim() else values.reshape(1, 1)
    few = first[:LOOKED_AT]  # mostly these tell, and then the rest is not looked at
    constant = bool((few == first[:1]).all()) and bool((first == first[:1]).all())
    small = SMALL * _usual(values)
    return constant or (bool(few.abs().max() < small) and bool(values.abs().max() < small))


def _usual(values: Tensor) -> float:
    """The size of a weight of this shape that hands on the size of its input; 1 for vectors."""
    inputs = values[0].numel() if values.dim() > 1 else 1
    return 1.0 / math.sqrt(max(inputs, 1))


def _counting(values: Tensor, generator: torch.Generator) -> Tensor:
    """Random values: around the old mean, or around 0 for matrices and kernels."""
    noise = torch.rand(values.shape, generator=generator, dtype=torch.float64).to(values.device) - 0.5
    scale = _usual(values)
    return values.double() + 2 * scale * noise if scale < 1 else values.double() + noise
