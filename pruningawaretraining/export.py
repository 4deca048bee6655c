"""ONNX export that is checked: the file is run in onnxruntime and compared with the model before it is put in place.

Half precision and 8-bit integers are made from the checked graph, and checked again, with wider tolerances.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining import onnx_graph
from pruningawaretraining.checkpoint import summary_of
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.exporters import AUTO, chosen_exporter
from pruningawaretraining.inputs import evaluating, move, unwrap
from pruningawaretraining.onnx_graph import (
    Graph,
    batch_of,
    build_graph,
    export_graph,
    open_session,
    opsets,
    require,
    resize_batch,
)
from pruningawaretraining.precision import strict_float32
from pruningawaretraining.registry import canonical, lookup, register

_LOG = logging.getLogger(__name__)
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "int8": 0.25}
"""Largest difference by precision, as a fraction of the largest output."""
OWN = ("producer", "model", "parameters", "batch", "exporter", "torch", "precision", "pruning")
"""Entries of a file's metadata that the library writes."""
_SINGLE_FILE_BYTES = 1_900_000_000  # protobuf holds at most 2 GiB; above this the weights go to <name>.data


@dataclass(frozen=True)
class ExportResult:
    """An ONNX file that agrees with the model it was made from.

    Attributes:
        path: the file.
        max_abs_diff: largest absolute difference between the model's outputs and onnxruntime's, over all batches tried.
        exporter: "dynamo" or "torchscript".
        opset: version of the default operator set in the file.
        inputs: names of the graph's inputs, in order.
        outputs: names of the graph's outputs, in order.
        relative_diff: ``max_abs_diff`` relative to the largest output, which the tolerance is about.
        batch_sizes: the batch sizes that were compared.
        precision: "float32", "float16" or "int8".
    """

    path: Path
    max_abs_diff: float
    exporter: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    relative_diff: float = 0.0
    batch_sizes: tuple[int, ...] = ()
    precision: str = "float32"


def export_onnx(
    model: torch.nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    exporter: str = AUTO,
    dynamic_batch: bool = True,
    opset: int | None = None,
    tolerance: float | None = None,
    precision: str = "float32",
    calibration: Iterable[Any] = (),
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    metadata: Mapping[str, object] | None = None,
) -> ExportResult:
    """Export a model to ONNX in eval mode and check the file in onnxruntime.

    The file is compared with the model on the example batch and, if the batch is dynamic, on other batch sizes with
    random data. Only a file that passes replaces what is at ``path``. Modes of the model's modules are as before.

    Args:
        model: the model; one on another device is copied to the CPU first.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        path: the file to write; its folder is created.
        exporter: "dynamo" (torch.export), "torchscript" (tracing), or "auto", PyTorch's own choice: the first from 2.9
            on.
        dynamic_batch: leave the batch dimension of inputs and outputs free.
        opset: version of the ONNX operator set; None is the exporter's own choice. Exporters do not know every one.
        tolerance: largest difference allowed, as a fraction of the largest absolute output; None is 1e-4 for float32,
            2e-2 for float16, 0.25 for int8.
        precision: "float32"; "float16", whose inputs and outputs stay float32; or "int8", onnxruntime's static
            quantization of weights (by channel) and activations.
        calibration: for int8: batches in the form of ``example_inputs``, for the ranges of activations; what comes
            after the model's inputs, such as labels, is left out. The file is compared on the first few of them.
        dynamic_axes: more free dimensions: input -> dimension -> name.
        metadata: written to the file's metadata as text, beside this library's own entries and, of a pruned model, its
            pruning.

    Raises:
        ConfigError: unknown exporter, precision or axis, int8 without calibration, a tolerance that is not positive, a
            folder as path, an entry of this library in ``metadata``, or a package is missing.
        ModelError: the model rejects the inputs or cannot be exported, batches of ``calibration`` do not fit it, or the
            file disagrees with it.
    """
    precision = canonical("precision", precision, "precision")
    tolerance = TOLERANCES.get(precision, 1e-4) if tolerance is None else tolerance
    if not tolerance > 0:
        raise ConfigError(f"tolerance: {tolerance!r} is not a positive number")
    path, exporter = Path(path), chosen_exporter(exporter)
    if path.is_dir():
        raise ConfigError(
            f"path: {str(path)!r} is a folder. Allowed: a file in it, such as {str(path / 'model.onnx')!r}"
        )
    own = next((key for key in metadata or {} if key in OWN), None)
    if own is not None:
        raise ConfigError(f"metadata: {own!r} is an entry of this library. Allowed: any but {', '.join(OWN)}")
    graph = build_graph(model, example_inputs, dynamic_batch, dynamic_axes)
    cpu = torch.device("cpu")
    batches = [
        batch_of(graph, example_inputs, move(one, cpu), f"calibration[{number}]")
        for number, one in enumerate(calibration)
    ]
    convert: Convert = lookup("precision", precision)
    properties = _properties(graph, exporter, {"precision": precision, **_pruning(model), **(metadata or {})})
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=path.parent) as folder:
        written, final = Path(folder) / "exported.onnx", Path(folder) / path.name
        export_graph(graph, written, exporter, opset)
        version = _finish(convert(written, graph, batches), final, properties)
        if opset not in (None, version):
            raise ConfigError(
                f"opset: {opset!r} is not what the exporter {exporter!r} wrote, which is {version}. Allowed: that, "
                f"None for the exporter's own choice, or another exporter ({opsets()}). Nothing was written"
            )
        difference, scale, sizes = _compare(graph, final, batches[:4] if precision == "int8" else None)
        if not difference <= tolerance * max(scale, 1e-12):
            raise ModelError(
                f"{path.name}: onnxruntime differs from the model by {difference:.3g} where outputs reach {scale:.3g}; "
                f"allowed is tolerance={tolerance:g} of that. Nothing was written{_half(model)}"
            )
        for part in (final.with_name(final.name + ".data"), final):
            if part.exists():
                os.replace(part, path.with_name(part.name))
    relative = difference / max(scale, 1e-12)
    _LOG.info("%s: opset %d, largest difference %.3g (%.2g of the output)", path, version, difference, relative)
    names = (graph.input_names, graph.output_names)
    return ExportResult(path, difference, exporter, version, *names, relative, sizes, precision)


def _half(model: nn.Module) -> str:
    """A hint where the model itself computes in 16 bits."""
    kinds = {one.dtype for one in model.parameters()} & {torch.float16, torch.bfloat16}
    if not kinds:
        return ""
    kind = str(kinds.pop()).removeprefix("torch.")
    return (
        f'. The model is in {kind}: allow tolerance={TOLERANCES["float16"]:g}, or model.float() and precision="float16"'
    )


# --- precisions -----------------------------------------------------------------------------------------------------

Convert = Callable[[Path, Graph, Sequence[tuple[Tensor, ...]]], Path]


@register("precision", "float32", "fp32")
def keep_precision(written: Path, graph: Graph, batches: Sequence[tuple[Tensor, ...]]) -> Path:
    """The file as it is."""
    return written


@register("precision", "float16", "fp16", "half")
def to_float16(written: Path, graph: Graph, batches: Sequence[tuple[Tensor, ...]]) -> Path:
    """Weights and operators in half precision; inputs and outputs stay as they are."""
    onnx, half = require("onnx"), require("onnxruntime.transformers.float16")
    converted = half.convert_float_to_float16(onnx.load(str(written)), keep_io_types=True)
    ordered = require("onnxruntime.transformers.onnx_model").OnnxModel(converted)
    ordered.topological_sort()  # casts of inputs are put at the end
    return _saved(ordered.model, written.with_name("half.onnx"))


@register("precision", "int8")
def to_int8(written: Path, graph: Graph, batches: Sequence[tuple[Tensor, ...]]) -> Path:
    """onnxruntime's static quantization, with quantize and dequantize nodes around operators.

    Raises:
        ConfigError: there are no batches.
    """
    if not batches:
        raise ConfigError('calibration: precision="int8" needs data. Allowed: batches in the form of example_inputs')
    quantization = require("onnxruntime.quantization")
    prepared, target = written.with_name("prepared.onnx"), written.with_name("int8.onnx")
    whole = _saved(require("onnx").load(str(written)), written.with_name("whole.onnx"))
    require("onnxruntime.quantization.shape_inference").quant_pre_process(
        str(whole), str(prepared), skip_symbolic_shape=True
    )

    quantization.quantize_static(
        str(prepared), str(target), _Reader(graph, batches), per_channel=True, reduce_range=_reduced()
    )
    return target


class _Reader:
    """Batches as onnxruntime reads them: one after the other, then None."""

    def __init__(self, graph: Graph, batches: Sequence[tuple[Tensor, ...]]) -> None:
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


def _saved(model: Any, path: Path) -> Path:
    large = _initializer_bytes(model) >= _SINGLE_FILE_BYTES
    require("onnx").save_model(model, str(path), save_as_external_data=large)
    return path


def _initializer_bytes(model: Any) -> int:
    return sum(len(tensor.raw_data) or 8 * _elements(tensor) for tensor in model.graph.initializer)


def _pruning(model: nn.Module) -> dict[str, str]:
    """What its pruner, or its file, says of a model."""
    summary = summary_of(unwrap(model))
    return {"pruning": json.dumps(summary)} if summary else {}


def check_opset(exporter: str, opset: int, key: str = "opset") -> None:
    """Refuse an opset that an exporter does not write, by the export of one linear layer.

    Raises:
        ConfigError: it does not.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            export_onnx(nn.Linear(2, 2), torch.zeros(2, 2), Path(folder) / "m.onnx", exporter=exporter, opset=opset)
        except (ConfigError, ModelError) as error:
            raise ConfigError(f"{key}: {opset} is refused. {error}") from error


def _properties(graph: Graph, exporter: str, metadata: Mapping[str, object] | None) -> dict[str, str]:
    """The text entries of the file's metadata."""
    own = {
        "producer": "pruningawaretraining",
        "model": type(next(graph.module.children())).__name__,
        "parameters": sum(parameter.numel() for parameter in graph.module.parameters()),
        "batch": "dynamic" if graph.dynamic else graph.inputs[0].shape[0] if graph.inputs[0].ndim else "none",
        "exporter": exporter,
        "torch": torch.__version__,
    }
    return {key: str(value) for key, value in {**own, **(metadata or {})}.items()}


def _finish(written: Path, final: Path, properties: Mapping[str, str]) -> int:
    """Write the exported file again: one file if it fits, with metadata and a named batch. Returns its opset."""
    onnx = require("onnx")
    model = onnx.load(str(written))
    onnx.helper.set_model_props(model, {**{item.key: item.value for item in model.metadata_props}, **properties})
    if _initializer_bytes(model) < _SINGLE_FILE_BYTES:
        onnx.save_model(model, str(final), save_as_external_data=False)
    else:
        onnx.save_model(model, str(final), save_as_external_data=True, location=final.name + ".data")
    onnx.checker.check_model(str(final))
    versions = {item.domain: item.version for item in model.opset_import}
    return int(versions.get("", versions.get("ai.onnx", 0)))


def _elements(tensor: Any) -> int:
    """The number of elements of an ONNX tensor."""
    return math.prod(int(size) for size in tensor.dims)


def _compare(
    graph: Graph, path: Path, given: Sequence[tuple[Tensor, ...]] | None = None
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
        expected = _reference(graph, tensors)
        feed = onnx_graph.as_arrays(session, dict(zip(graph.input_names, tensors, strict=True)))
        hint = ". If the model fixes its batch size, pass dynamic_batch=False" if graph.dynamic else ""
        found = [torch.from_numpy(array) for array in onnx_graph.checked_run(session, feed, hint)]
        for name, left, right in zip(graph.output_names, expected, found, strict=True):
            difference = max(difference, _difference(name, left, right))
            scale = max(scale, _largest(left))
    return difference, scale, sizes


def _reference(graph: Graph, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The model's own outputs in eval mode."""
    try:
        with torch.no_grad(), evaluating(graph.module), strict_float32(), onnx_graph.without_attention_fastpath():
            outputs: tuple[Tensor, ...] = graph.module(*tensors)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"the model rejects another batch size, inputs of shape {shapes}: {reason}. Pass dynamic_batch=False"
        ) from error
    return outputs


def _random_batch(graph: Graph, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
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
