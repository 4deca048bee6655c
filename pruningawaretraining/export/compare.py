"""An exported file against its model: the outputs of onnxruntime and of PyTorch on the same batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruningawaretraining.errors import ModelError
from pruningawaretraining.models.calling import evaluating
from pruningawaretraining.models.precision import strict_float32
from pruningawaretraining.runtimes import exporters, ort
from pruningawaretraining.runtimes.flat_model import FlatGraph, resize_batch
from pruningawaretraining.runtimes.ort import open_session


def compare(
    graph: FlatGraph, path: Path, given: Sequence[tuple[Tensor, ...]] | None = None
) -> tuple[float, float, tuple[int, ...]]:
    """Largest absolute difference, largest absolute output and batch sizes over the example and random batches, or
    over those that are given."""
    session = open_session(str(path))
    size = graph.inputs[0].shape[0] if graph.inputs[0].ndim else 1
    sizes = tuple(dict.fromkeys((size, size + 1, 1))) if graph.dynamic else (size,)
    generator = torch.Generator().manual_seed(0)
    batches = [graph.inputs, *(_random_batch(graph, rows, generator) for rows in sizes[1:] or sizes)]
    if given:
        batches, sizes = list(given), tuple(dict.fromkeys(len(one[0]) for one in given))
    difference, scale = 0.0, 0.0
    for tensors in batches:
        expected = reference(graph, tensors)
        found = outputs_in_onnxruntime(graph, session, tensors)
        for name, left, right in zip(graph.output_names, expected, found, strict=True):
            difference = max(difference, _difference(name, left, right))
            scale = max(scale, _largest(left))
    return difference, scale, sizes


def outputs_in_onnxruntime(graph: FlatGraph, session: Any, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The outputs of a session on the inputs of its graph."""
    feed = ort.as_arrays(session, dict(zip(graph.input_names, tensors, strict=True)))
    hint = ". If the model fixes its batch size, pass dynamic_batch=False" if graph.dynamic else ""
    return [torch.from_numpy(array) for array in ort.checked_run(session, feed, hint)]


def reference(graph: FlatGraph, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The model's own outputs in eval mode."""
    try:
        with torch.no_grad(), evaluating(graph.module), strict_float32(), exporters.without_attention_fastpath():
            outputs: tuple[Tensor, ...] = graph.module(*tensors)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"the model rejects another batch size, inputs of shape {shapes}: {reason}. Pass dynamic_batch=False"
        ) from error
    return outputs


def _random_batch(graph: FlatGraph, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Inputs of ``rows`` rows: normal with the example's mean and deviation; of integers, the example's own values."""

    def one(tensor: Tensor, batched: bool) -> Tensor:
        if not batched:
            return tensor
        values = resize_batch(tensor, rows)
        if tensor.is_floating_point():
            noise = torch.randn(values.shape, generator=generator, dtype=torch.float32)
            spread = tensor.float().std(correction=0).clamp_min(1e-3)
            return (tensor.float().mean() + spread * noise).to(tensor.dtype)
        order = torch.randperm(values.numel(), generator=generator)
        return values.flatten()[order].reshape(values.shape)

    return tuple(one(tensor, batched) for tensor, batched in zip(graph.inputs, graph.batched, strict=True))


def _difference(name: str, expected: Tensor, found: Tensor) -> float:
    """Largest absolute difference; infinite where one side alone is NaN or infinite."""
    if expected.shape != found.shape:
        raise ModelError(
            f"output {name!r}: shape {tuple(found.shape)} in onnxruntime, {tuple(expected.shape)} in the model"
        )
    left, right = expected.double(), found.double()
    same = (left == right) | (left.isnan() & right.isnan())
    gaps = torch.where(same, 0.0, (left - right).abs()).nan_to_num(nan=float("inf"))
    return float(gaps.max()) if gaps.numel() else 0.0


def _largest(tensor: Tensor) -> float:
    finite = tensor.double()[tensor.double().isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
