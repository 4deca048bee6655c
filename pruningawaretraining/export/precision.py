"""Precisions of an exported file: float32 and float16; int8 is in :mod:`pruningawaretraining.export.int8`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from pruningawaretraining.registry import register
from pruningawaretraining.runtimes.flat_model import FlatGraph
from pruningawaretraining.runtimes.ort import require

SINGLE_FILE_BYTES = 1_900_000_000  # protobuf holds at most 2 GiB; above this the weights go to <name>.data

Batches = Sequence[tuple[Tensor, ...]]


@dataclass(frozen=True)
class Converted:
    """A file in another precision.

    Attributes:
        path: the file.
        excluded: layers that were left in float32.
        layer_errors: error of the outputs with one layer alone converted, as a fraction of the outputs, by layer, the
            worst first; empty where it was not asked for.
    """

    path: Path
    excluded: tuple[str, ...] = ()
    layer_errors: Mapping[str, float] = field(default_factory=dict)


class Precision(Protocol):
    """Interface of registered precisions: frozen dataclasses with the precision's options.

    Attributes:
        tolerance: largest difference from the model, as a fraction of the largest output.
        agreement: fraction of the calibration data's rows on which the largest output should be the model's.
        compared_on_data: whether the file is compared with the model on the calibration data alone.
    """

    tolerance: ClassVar[float]
    agreement: float
    compared_on_data: ClassVar[bool]

    def check(self, graph: FlatGraph, batches: Batches) -> None:
        """Refuse what cannot be converted, before the export."""
        ...

    def convert(self, written: Path, graph: FlatGraph, batches: Batches) -> Converted:
        """Convert an exported float32 file, beside it."""
        ...


@register("precision", "float32", "fp32")
@dataclass(frozen=True)
class Float32:
    """The file as it was exported."""

    tolerance: ClassVar[float] = 1e-4
    compared_on_data: ClassVar[bool] = False
    agreement: ClassVar[float] = 0.0

    def check(self, graph: FlatGraph, batches: Batches) -> None:
        """See :class:`Precision`."""

    def convert(self, written: Path, graph: FlatGraph, batches: Batches) -> Converted:
        """See :class:`Precision`."""
        return Converted(written)


@register("precision", "float16", "fp16", "half")
@dataclass(frozen=True)
class Float16:
    """Weights and operators in half precision; inputs and outputs stay as they are.

    Args:
        agreement: below this a warning says how often the file agrees with the model on ``calibration``.
    """

    tolerance: ClassVar[float] = 2e-2
    compared_on_data: ClassVar[bool] = False
    agreement: float = 0.98

    def check(self, graph: FlatGraph, batches: Batches) -> None:
        """See :class:`Precision`."""

    def convert(self, written: Path, graph: FlatGraph, batches: Batches) -> Converted:
        """See :class:`Precision`."""
        onnx, half = require("onnx"), require("onnxruntime.transformers.float16")
        converted = half.convert_float_to_float16(onnx.load(str(written)), keep_io_types=True)
        ordered = require("onnxruntime.transformers.onnx_model").OnnxModel(converted)
        ordered.topological_sort()  # casts of inputs are put at the end
        return Converted(saved(ordered.model, written.with_name("half.onnx")))


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
