"""Precisions of an exported file: float32, float16, and int8 by static quantization."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruningawaretraining.errors import ConfigError
from pruningawaretraining.registry import register
from pruningawaretraining.runtimes.flat_model import FlatGraph
from pruningawaretraining.runtimes.ort import require

SINGLE_FILE_BYTES = 1_900_000_000  # protobuf holds at most 2 GiB; above this the weights go to <name>.data

Convert = Callable[[Path, FlatGraph, Sequence[tuple[Tensor, ...]]], Path]


@register("precision", "float32", "fp32")
def keep_precision(written: Path, graph: FlatGraph, batches: Sequence[tuple[Tensor, ...]]) -> Path:
    """Keep the file unchanged."""
    return written


@register("precision", "float16", "fp16", "half")
def to_float16(written: Path, graph: FlatGraph, batches: Sequence[tuple[Tensor, ...]]) -> Path:
    """Weights and operators in half precision; inputs and outputs stay as they are."""
    onnx, half = require("onnx"), require("onnxruntime.transformers.float16")
    converted = half.convert_float_to_float16(onnx.load(str(written)), keep_io_types=True)
    ordered = require("onnxruntime.transformers.onnx_model").OnnxModel(converted)
    ordered.topological_sort()  # casts of inputs are put at the end
    return saved(ordered.model, written.with_name("half.onnx"))


@register("precision", "int8")
def to_int8(written: Path, graph: FlatGraph, batches: Sequence[tuple[Tensor, ...]]) -> Path:
    """onnxruntime's static quantization, with quantize and dequantize nodes around operators.

    Raises:
        ConfigError: there are no batches.
    """
    if not batches:
        raise ConfigError('calibration: precision="int8" needs data. Allowed: batches in the form of example_inputs')
    quantization = require("onnxruntime.quantization")
    prepared, target = written.with_name("prepared.onnx"), written.with_name("int8.onnx")
    whole = saved(require("onnx").load(str(written)), written.with_name("whole.onnx"))
    require("onnxruntime.quantization.shape_inference").quant_pre_process(
        str(whole), str(prepared), skip_symbolic_shape=True
    )

    quantization.quantize_static(
        str(prepared), str(target), _Reader(graph, batches), per_channel=True, reduce_range=_reduced()
    )
    return target


class _Reader:
    """Batches as onnxruntime reads them: one after the other, then None."""

    def __init__(self, graph: FlatGraph, batches: Sequence[tuple[Tensor, ...]]) -> None:
        self._names, self._left = graph.input_names, iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        """The next batch."""
        tensors = next(self._left, None)
        if tensors is None:
            return None
        return {name: one.numpy() for name, one in zip(self._names, tensors, strict=True)}


def _reduced() -> bool:
    """Whether 7 bits are safer: without VNNI, x86 sums pairs of 8-bit products in 16 bits, which may saturate."""
    return not torch.cpu._is_vnni_supported() if hasattr(torch.cpu, "_is_vnni_supported") else False


def saved(model: Any, path: Path) -> Path:
    """Write an ONNX model, its weights beside it where protobuf cannot hold them."""
    large = initializer_bytes(model) >= SINGLE_FILE_BYTES
    require("onnx").save_model(model, str(path), save_as_external_data=large)
    return path


def initializer_bytes(model: Any) -> int:
    """Bytes of the weights of an ONNX model."""
    return sum(len(tensor.raw_data) or 8 * _elements(tensor) for tensor in model.graph.initializer)


def _elements(tensor: Any) -> int:
    """The number of elements of an ONNX tensor."""
    return math.prod(int(size) for size in tensor.dims)
