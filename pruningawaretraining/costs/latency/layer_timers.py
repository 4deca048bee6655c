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
from pruningawaretraining.runtimes.timing import clock_of, least_ms

Point = tuple[int, int]
Timer = Callable[[LayerShape, Sequence[Point], Runtime, int], list[float]]
ALIKE = 1.05
"""A point whose two times differ by less is not timed a third time."""


def swept(points: Sequence[Point], timed: Callable[[Point], float]) -> list[float]:
    """The least time of every point: all twice, one after the other, so that a slow moment of the machine spoils none;
    those whose times differ once more."""
    first, second = [timed(one) for one in points], [timed(one) for one in points]
    pairs = zip(points, first, second, strict=True)
    return [min(a, b) if max(a, b) <= ALIKE * min(a, b) else min(a, b, timed(at)) for at, a, b in pairs]


def time_modules(shape: LayerShape, points: Sequence[Point], runtime: Runtime, threads: int) -> list[float]:
    """Time the layer as a module of its own."""
    clock = clock_of(runtime, threads)

    def timed(point: Point) -> float:
        outputs, inputs_ = point
        with runtime.prepare(shape.module(outputs, inputs_), shape.input(inputs_), threads) as run:
            return least_ms(run, clock)

    return swept(points, timed)


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
        return swept(points, lambda one: _kernel_ms(shape, one, threads, Path(folder)))


def _kernel_ms(shape: LayerShape, point: Point, threads: int, folder: Path) -> float:
    array = shape.input(point[1]).float().numpy()
    options = ort.session_options(threads)
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "times")
    graph = layer_graph(shape, *point)
    session = ort.require("onnxruntime").InferenceSession(graph, options, providers=list(ort.ON_CPU))
    least_ms(lambda: session.run(None, {"x": array}), time.perf_counter)  # the profiler takes the times that count
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
    """An ONNX graph of the layer alone, from ``x`` to ``y``.

    Its weights are made by nodes that onnxruntime folds when it loads the graph: megabytes need not be serialized.
    """
    onnx = ort.require("onnx")
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    groups = inputs_ if shape.kind == "depthwise" else shape.groups
    first, second = (inputs_, outputs) if shape.transposed or shape.kind == "linear" else (outputs, inputs_)
    sizes = {"w": (first, second // groups, *shape.kernel), "b": (outputs,)}
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
    filled = [_filled(name, value) for name, value in (("w", 0.01), ("b", 0.1))]
    constants = [_constant(numpy.array(size, numpy.int64), f"size of {name}") for name, size in sizes.items()]
    wanted = [helper.make_tensor_value_info("y", real, None)]
    graph = helper.make_graph([*filled, *nodes], "layer", [given], wanted, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


def _filled(name: str, value: float) -> Any:
    """A node that makes a tensor of one value."""
    one = _constant(numpy.array([value], numpy.float32), "value")
    return ort.require("onnx").helper.make_node("ConstantOfShape", [f"size of {name}"], [name], value=one)


def _constant(values: NDArray[Any], name: str) -> Any:
    return ort.require("onnx").numpy_helper.from_array(values, name)
