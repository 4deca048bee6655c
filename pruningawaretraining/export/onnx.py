"""ONNX export that is checked: the file is run in onnxruntime and compared with the model before it is put in place.

Half precision and 8-bit integers are made from the checked graph, and checked again, with wider tolerances.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.checkpoint.records import summary_of
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.export.agreement import Agreement, agreement, labels_of
from pruningawaretraining.export.compare import compare
from pruningawaretraining.export.precision import SINGLE_FILE_BYTES, Converted, Float16, Precision, initializer_bytes
from pruningawaretraining.files import place_of, writing
from pruningawaretraining.models.calling import move, unwrap
from pruningawaretraining.registry import build, canonical, names
from pruningawaretraining.runtimes.exporter_choice import AUTO, chosen_exporter
from pruningawaretraining.runtimes.exporters import export_graph, opsets
from pruningawaretraining.runtimes.flat_model import FlatGraph, batch_of, build_graph
from pruningawaretraining.runtimes.ort import require

logger = logging.getLogger(__name__)
OWN = ("producer", "model", "parameters", "batch", "exporter", "torch", "precision", "pruning")
"""Entries of a file's metadata that the library writes."""


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
        agreement: with the model, on the calibration data; None without data, or where the outputs have no classes.
        excluded: layers that int8 left in float32.
        layer_errors: what each layer alone would cost in int8, the worst first, where ``exclude`` asked for the worst.
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
    agreement: Agreement | None = None
    excluded: tuple[str, ...] = ()
    layer_errors: Mapping[str, float] = field(default_factory=dict)


def export_onnx(
    model: torch.nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    exporter: str = AUTO,
    dynamic_batch: bool = True,
    opset: int | None = None,
    tolerance: float | None = None,
    precision: str | Mapping[str, Any] | Precision = "float32",
    calibration: Iterable[Any] = (),
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    metadata: Mapping[str, object] | None = None,
) -> ExportResult:
    """Export a model to ONNX in eval mode and check the file in onnxruntime.

    The file is compared on the example batch and, if the batch is dynamic, on other batch sizes with random data. Only
    a file that passes replaces the one at ``path``. The modules' modes are restored.

    Args:
        model: the model; a copy on the CPU is exported if it is on another device.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        path: the file to write; its folder is created.
        exporter: "dynamo" (torch.export), "torchscript" (tracing), or "auto": PyTorch's choice, dynamo from 2.9 on.
        dynamic_batch: leave the batch dimension of inputs and outputs free.
        opset: version of the ONNX operator set; None for the exporter's choice.
        tolerance: largest difference as a fraction of the largest output; None for the precision's: 1e-4, 0.02 or 0.25.
        precision: "float32"; "float16" (inputs and outputs stay float32); "int8" (onnxruntime's static quantization);
            or ``{"type": name, **options}``, see :class:`~pruningawaretraining.export.int8.Int8`.
        calibration: batches like ``example_inputs``, for int8, and to measure how often the file agrees with the model;
            with labels after the inputs, also how often both are right.
        dynamic_axes: more free dimensions: input -> dimension -> name.
        metadata: entries added to the file's metadata.

    Raises:
        ConfigError: a bad option, or a missing package.
        ModelError: the inputs or ``calibration`` do not fit, the export fails, or the file disagrees with the model.
    """
    settings = _settings(Path(path), exporter, opset, tolerance, precision)
    properties = {"precision": settings.name, **_pruning(model), **_allowed(metadata or {})}
    graph = build_graph(model, example_inputs, dynamic_batch, dynamic_axes)
    data = _Data.of(graph, example_inputs, calibration)
    settings.precision.check(graph, data.batches)
    return _export(graph, settings, data, _properties(graph, settings.exporter, properties), _half(model))


@dataclass(frozen=True)
class _Data:
    """Calibration data: the graph's inputs, and the labels of each batch where it has any."""

    batches: Sequence[tuple[Tensor, ...]]
    labels: Sequence[Tensor | None]

    @classmethod
    def of(cls, graph: FlatGraph, example_inputs: Any, calibration: Iterable[Any]) -> _Data:
        """The user's calibration data, on the CPU; a batch that does not fit is named."""
        moved = [move(one, torch.device("cpu")) for one in calibration]
        batches = [batch_of(graph, example_inputs, one, f"calibration[{number}]") for number, one in enumerate(moved)]
        labels = [labels_of(graph, one) for one in moved]
        for number, (batch, given) in enumerate(zip(batches, labels, strict=True)):
            rows = len(batch[0]) if batch[0].ndim else None
            if given is not None and rows is not None and len(given) != rows:
                raise ModelError(f"calibration[{number}]: {len(given)} labels of {rows} rows. Expected: one for each")
        return cls(batches, labels)


@dataclass(frozen=True)
class _Settings:
    """Checked options of an export; see :func:`export_onnx`."""

    path: Path
    exporter: str
    opset: int | None
    tolerance: float
    precision: Precision
    name: str


def _settings(path: Path, exporter: str, opset: int | None, tolerance: float | None, precision: Any) -> _Settings:
    named = precision.get("type") if isinstance(precision, Mapping) else precision
    name = canonical("precision", named, "precision") if isinstance(named, str) else type(precision).__name__.lower()
    built: Precision = build("precision", precision)
    if not hasattr(built, "convert"):
        raise ConfigError(f"precision: {precision!r} is not a precision. Allowed: {', '.join(names('precision'))}")
    tolerance = built.tolerance if tolerance is None else tolerance
    if not tolerance > 0:
        raise ConfigError(f"tolerance: {tolerance!r} is not a positive number")
    exporter = chosen_exporter(exporter)
    place_of(path, kind=ConfigError)
    return _Settings(path, exporter, opset, tolerance, built, name)


def _allowed(metadata: Mapping[str, object]) -> Mapping[str, object]:
    """A user's metadata, unless it would overwrite an entry of this library."""
    own = next((key for key in metadata if key in OWN), None)
    if own is not None:
        raise ConfigError(f"metadata: {own!r} is an entry of this library. Allowed: any but {', '.join(OWN)}")
    return metadata


def _export(
    graph: FlatGraph,
    settings: _Settings,
    data: _Data,
    properties: Mapping[str, str],
    hint: str,
) -> ExportResult:
    """Write the file beside its place, check it there, and move it."""
    path, opset, precision = place_of(settings.path), settings.opset, settings.precision
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=path.parent) as folder:
        written, final = Path(folder) / "exported.onnx", Path(folder) / path.name
        export_graph(graph, written, settings.exporter, opset)
        converted = precision.convert(written, graph, data.batches)
        version = _finish(converted.path, final, properties)
        if opset not in (None, version):
            raise ConfigError(
                f"opset: {opset!r} is not what the exporter {settings.exporter!r} wrote, which is {version}. Allowed: "
                f"that, None for the exporter's own choice, or another exporter ({opsets()}). Nothing was written"
            )
        difference, scale, sizes = compare(graph, final, data.batches[:4] if precision.compared_on_data else None)
        relative = difference / max(scale, 1e-12)
        if not relative <= settings.tolerance:
            raise ModelError(
                f"{path.name}: onnxruntime differs from the model by {difference:.3g} where outputs reach {scale:.3g}; "
                f"allowed is tolerance={settings.tolerance:g} of that. Nothing was written{hint}"
            )
        found = agreement(graph, final, data.batches, data.labels) if data.batches else None
        with writing(path):
            for part in (final.with_name(final.name + ".data"), final):
                if part.exists():
                    os.replace(part, path.with_name(part.name))
    logger.info("%s: opset %d, largest difference %.3g (%.2g of the output)", path, version, difference, relative)
    _tell_of(found, settings, converted)
    ends = (graph.input_names, graph.output_names)
    result = ExportResult(settings.path, difference, settings.exporter, version, *ends, relative, sizes, settings.name)
    return replace(result, agreement=found, excluded=converted.excluded, layer_errors=converted.layer_errors)


def _tell_of(found: Agreement | None, settings: _Settings, converted: Converted) -> None:
    """Say how often the file agrees with the model; warn where that is too seldom."""
    if found is None:
        return
    text = f"{settings.path.name}: {settings.name} {found}"
    if found.same >= settings.precision.agreement:
        logger.info(text)
        return
    more = len(converted.excluded) + 2
    logger.warning(
        f"{text}, and {settings.precision.agreement:.1%} is asked for. Allowed: more calibration data, "
        f'quantization-aware training, or precision={{"type": "int8", "exclude": {more}}}: the {more} worst layers '
        "stay in float32"
    )


def _half(model: nn.Module) -> str:
    """A hint where the model itself computes in 16 bits."""
    kinds = {one.dtype for one in model.parameters()} & {torch.float16, torch.bfloat16}
    if not kinds:
        return ""
    kind = str(kinds.pop()).removeprefix("torch.")
    return f'. The model is in {kind}: allow tolerance={Float16.tolerance:g}, or model.float() and precision="float16"'


def _pruning(model: nn.Module) -> dict[str, str]:
    """The pruning entry of a model's metadata."""
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


def _properties(graph: FlatGraph, exporter: str, metadata: Mapping[str, object] | None) -> dict[str, str]:
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
    if initializer_bytes(model) < SINGLE_FILE_BYTES:
        onnx.save_model(model, str(final), save_as_external_data=False)
    else:
        onnx.save_model(model, str(final), save_as_external_data=True, location=final.name + ".data")
    onnx.checker.check_model(str(final))
    versions = {item.domain: item.version for item in model.opset_import}
    return int(versions.get("", versions.get("ai.onnx", 0)))
