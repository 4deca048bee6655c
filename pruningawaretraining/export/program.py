"""Other forms to deploy: a program of torch.export (.pt2), and OpenVINO's intermediate representation, both checked."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.errors import ModelError
from pruningawaretraining.export.onnx import export_onnx
from pruningawaretraining.files import place_of, write_atomically
from pruningawaretraining.models.calling import evaluating
from pruningawaretraining.models.precision import strict_float32
from pruningawaretraining.runtimes import exporters
from pruningawaretraining.runtimes.exporters import dynamic_shapes
from pruningawaretraining.runtimes.flat_model import FlatGraph, build_graph
from pruningawaretraining.runtimes.ort import require


def export_program(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
) -> float:
    """Write a program of torch.export (``.pt2``) that takes the model's tensors positionally and returns a tuple.

    ExecuTorch, AOTInductor and torch_tensorrt start from such programs. It is loaded again and compared on the example.

    Args:
        model: the model; one on another device is copied to the CPU first.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        path: the file to write.
        dynamic_batch: leave the batch dimension free.
        tolerance: largest difference allowed, as a fraction of the largest output.

    Returns:
        The largest difference.

    Raises:
        ModelError: the model cannot be exported, or the program disagrees with it.
    """
    place_of(path)
    graph = build_graph(model, example_inputs, dynamic_batch)
    program, expected = _exported(graph, type(model).__name__)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "program.pt2"
        torch.export.save(program, written)
        with strict_float32():
            found = torch.export.load(written).module()(*graph.inputs)
        difference = _checked(graph, expected, found, tolerance, Path(path).name)

        def place(temporary: str) -> None:
            shutil.copyfile(written, temporary)

        write_atomically(path, place)
    return difference


def _exported(graph: FlatGraph, name: str) -> tuple[torch.export.ExportedProgram, tuple[Tensor, ...]]:
    """The program of a flat model, and the model's own outputs on the example inputs."""
    try:
        with torch.no_grad(), evaluating(graph.module), exporters.without_attention_fastpath():
            with strict_float32():
                expected = graph.module(*graph.inputs)
            shapes = dynamic_shapes(graph)
            return torch.export.export(graph.module, graph.inputs, dynamic_shapes=shapes, strict=False), expected
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"torch.export cannot export {name}: {reason}. Or dynamic_batch=False") from error


def export_openvino(
    model: nn.Module, example_inputs: Any, path: str | Path, *, tolerance: float = 1e-3, half: bool = False
) -> float:
    """Write OpenVINO's intermediate representation (``.xml`` with a ``.bin`` beside it), by way of ONNX.

    Args:
        model, example_inputs: as in :func:`~pruningawaretraining.export.onnx.export_onnx`.
        path: the ``.xml`` file to write.
        tolerance: largest difference allowed on the CPU, as a fraction of the largest output.
        half: compress the weights to float16; a tolerance of 2e-2 is then apt.

    Returns:
        The largest difference.

    Raises:
        ConfigError: openvino is not installed (the extra ``openvino``).
        ModelError: the model cannot be exported, or the file disagrees with it.
    """
    openvino = require("openvino")
    path = Path(path)
    graph = build_graph(model, example_inputs, dynamic_batch=False)
    with tempfile.TemporaryDirectory() as folder:
        exported = export_onnx(model, example_inputs, Path(folder) / "model.onnx", exporter="torchscript").path
        converted = openvino.convert_model(str(exported))
        compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        outputs = compiled([one.numpy() for one in graph.inputs])
        with torch.no_grad(), evaluating(graph.module), strict_float32():
            expected = graph.module(*graph.inputs)
        found = tuple(torch.from_numpy(outputs[number]) for number in range(len(expected)))
        difference = _checked(graph, expected, found, tolerance, path.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        openvino.save_model(converted, str(path), compress_to_fp16=half)
    return difference


def _checked(
    graph: FlatGraph, expected: tuple[Tensor, ...], found: tuple[Tensor, ...], tolerance: float, name: str
) -> float:
    largest = 0.0
    for output, left, right in zip(graph.output_names, expected, found, strict=True):
        difference = float((left.detach().double() - right.detach().double()).abs().max()) if left.numel() else 0.0
        scale = float(left.detach().abs().max()) if left.numel() else 1.0
        if left.shape != right.shape or not difference <= tolerance * max(scale, 1e-12):
            raise ModelError(
                f"{name}: output {output!r} differs from the model by {difference:.3g} where it reaches {scale:.3g}; "
                f"allowed is tolerance={tolerance:g} of that. Nothing was written"
            )
        largest = max(largest, difference)
    return largest
