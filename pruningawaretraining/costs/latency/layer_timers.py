"""Timers of single layers: as modules in PyTorch, or as graphs of one node in onnxruntime."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from pruningawaretraining.costs.latency.layer_shapes import LayerShape
from pruningawaretraining.registry import lookup, register
from pruningawaretraining.runtimes import ort
from pruningawaretraining.runtimes.runtime import Runtime

Point = tuple[int, int]
Timer = Callable[[LayerShape, Sequence[Point], Runtime, int], list[float]]
LEAST_RUNS, MOST_RUNS, SPENT_MS = 3, 20, 4.0
SWEEPS = 3  # over all points, so that a slow moment of the machine spoils none


def least_ms(run: Callable[[], Any]) -> float:
    """Minimum over several runs: disturbances only make runs longer."""
    run()
    found: list[float] = []
    spent = 0.0
    while len(found) < LEAST_RUNS or (spent < SPENT_MS and len(found) < MOST_RUNS):
        start = time.perf_counter()
        run()
        found.append((time.perf_counter() - start) * 1e3)
        spent += found[-1]
    return min(found)


def time_modules(shape: LayerShape, points: Sequence[Point], runtime: Runtime, threads: int) -> list[float]:
    """Time the layer as a module of its own, by the clock."""
    found: list[list[float]] = []
    for _ in range(SWEEPS):
        found.append([])
        for outputs, inputs_ in points:
            with runtime.prepare(shape.module(outputs, inputs_), shape.input(inputs_), threads) as run:
                found[-1].append(least_ms(run))
    return [min(times) for times in zip(*found, strict=True)]


@register("layer_timer", "torch_compile")
def time_eagerly(shape: LayerShape, points: Sequence[Point], runtime: Runtime, threads: int) -> list[float]:
    """Compiling every width would take minutes: the tables are of eager PyTorch, and the fit of the model corrects."""
    eager: Runtime = lookup("runtime", "torch")(device=getattr(runtime, "device", None))
    return time_modules(shape, points, eager, threads)


@register("layer_timer", "onnxruntime")
def time_in_onnxruntime(shape: LayerShape, points: Sequence[Point], runtime: Runtime, threads: int) -> list[float]:
    """Time the layer's own kernels by onnxruntime's profiler.

    A graph of one convolution also reorders its input and output, which in a network happens at the ends of chains
    only; reorders are left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        sweeps = [[_kernel_ms(shape, one, threads, Path(folder)) for one in points] for _ in range(SWEEPS)]
    return [min(times) for times in zip(*sweeps, strict=True)]


def _kernel_ms(shape: LayerShape, point: Point, threads: int, folder: Path) -> float:
    runtime = ort.require("onnxruntime")
    outputs, inputs_ = point
    array = shape.input(inputs_).float().numpy()
    options = ort.session_options(threads)
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "times")
    graph = layer_graph(shape, outputs, inputs_)
    session = runtime.InferenceSession(graph, options, providers=list(ort.ON_CPU))
    least_ms(lambda: session.run(None, {"x": array}))
    path = Path(session.end_profiling())
    events = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    taken: dict[str, list[float]] = {}
    for event in events:
        kernel = event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        if kernel and not event["args"]["op_name"].startswith("Reorder"):
            taken.setdefault(event["name"], []).append(event["dur"] / 1e3)
    return math.fsum(min(times) for times in taken.values())


def layer_graph(shape: LayerShape, outputs: int, inputs_: int) -> bytes:
    """An ONNX graph of the layer alone, from ``x`` to ``y``."""
    onnx = ort.require("onnx")
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    groups = inputs_ if shape.kind == "depthwise" else shape.groups
    first, second = (inputs_, outputs) if shape.transposed or shape.kind == "linear" else (outputs, inputs_)
    weight = numpy.full((first, second // groups, *shape.kernel), 0.01, numpy.float32)
    constants = [_constant(weight, "w"), _constant(numpy.full(outputs, 0.1, numpy.float32), "b")]
    if shape.kind == "linear":
        nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
    else:
        nodes = [
            helper.make_node(
                "ConvTranspose" if shape.transposed else "Conv",
                ["x", "w", "b"],
                ["y"],
                kernel_shape=shape.kernel,
                strides=shape.stride,
                pads=[*shape.padding, *shape.padding],
                dilations=shape.dilation,
                group=groups,
            )
        ]
    given = helper.make_tensor_value_info("x", real, list(shape.input(inputs_).shape))
    graph = helper.make_graph(nodes, "layer", [given], [helper.make_tensor_value_info("y", real, None)], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


def _constant(values: NDArray[numpy.float32], name: str) -> Any:
    return ort.require("onnx").numpy_helper.from_array(values, name)
