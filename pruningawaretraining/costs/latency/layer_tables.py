"""How long one layer takes at any width: measured on a grid of widths, and what odd widths cost on top.

Shape suffixes: ``_O`` output widths of the grid, ``_I`` its input widths.

Kernels work on blocks of channels, so time is a staircase: a convolution with 63 inputs can take half as long again as
one with 64. The grid holds round widths, with straight lines between them; what a width costs beyond that line is
measured once for every remainder (of 8 or 16) along each side, next to the dense width.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pruningawaretraining.models import calling as inputs
from pruningawaretraining.registry import lookup, names, register
from pruningawaretraining.runtimes import exporters, ort
from pruningawaretraining.runtimes.runtime import Runtime

Point = tuple[int, int]
Timer = Callable[["LayerShape", Sequence[Point], Runtime, int], list[float]]
FRACTIONS = (1.0, 0.8, 0.6, 0.45, 0.3, 0.15)
LEAST_RUNS, MOST_RUNS, SPENT_MS = 3, 20, 4.0
SWEEPS = 3  # over all points, so that a slow moment of the machine spoils none
BLOCK, SMALL_BLOCK, SMALL = 16, 8, 64
VERSION = 1  # of how a table is measured: a change makes tables on disk count as absent


@dataclass(frozen=True)
class LayerShape:
    """A convolution or linear layer, and what goes through it.

    Attributes:
        kind: "conv", "depthwise" (one filter a channel), "linear", or "grouped" (any other convolution).
        outputs, inputs: dense widths.
        rows: the batch of a convolution; of a linear layer, everything before its last dimension.
        size: height and width (or as many as there are) of a convolution's input.
        kernel, stride, padding, dilation: of a convolution.
        groups: of a convolution.
        transposed: whether it is a transposed one.
        dtype: name of the weight's type.
    """

    kind: str
    outputs: int
    inputs: int
    rows: int
    size: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    dtype: str = "float32"

    def module(self, outputs: int, inputs_: int) -> nn.Module:
        """The layer at some widths."""
        if self.kind == "linear":
            return nn.Linear(inputs_, outputs, dtype=getattr(torch, self.dtype))
        kinds: list[Any] = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
        if self.transposed:
            kinds = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
        groups = inputs_ if self.kind == "depthwise" else self.groups
        widths, moves = (inputs_, outputs), (self.kernel, self.stride, self.padding)
        built: nn.Module = kinds[len(self.size) - 1](*widths, *moves, dilation=self.dilation, groups=groups)
        return built.to(getattr(torch, self.dtype))

    @property
    def positions(self) -> int:
        """Numbers that the layer writes for each channel."""
        if self.kind == "linear":
            return self.rows
        sides = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        if self.transposed:
            return self.rows * math.prod((n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in sides)
        return self.rows * math.prod((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)

    def input(self, width: int) -> Tensor:
        """Input at a width."""
        shape = (self.rows, width) if self.kind == "linear" else (self.rows, width, *self.size)
        return torch.full(shape, 0.5, dtype=getattr(torch, self.dtype))


def shape_of(module: nn.Module, given: Tensor) -> LayerShape | None:
    """The shape of a layer that was given this input, or None for other modules."""
    dtype = str(getattr(getattr(module, "weight", None), "dtype", torch.float32)).removeprefix("torch.")
    if isinstance(module, nn.Linear):
        rows = given.numel() // given.shape[-1]
        return LayerShape("linear", module.out_features, module.in_features, rows, dtype=dtype)
    if not isinstance(module, nn.modules.conv._ConvNd):
        return None
    padding = _padding(module)
    batched = given.dim() == len(module.kernel_size) + 2
    depthwise = module.groups == module.in_channels == module.out_channels and module.groups > 1
    plain = module.groups == 1 and not module.transposed
    return LayerShape(
        "depthwise" if depthwise and not module.transposed else "conv" if plain else "grouped",
        module.out_channels,
        module.in_channels,
        given.shape[0] if batched else 1,
        tuple(given.shape[2 if batched else 1 :]),
        tuple(module.kernel_size),
        tuple(module.stride),
        padding,
        tuple(module.dilation),
        module.groups,
        module.transposed,
        dtype,
    )


def _padding(module: nn.modules.conv._ConvNd) -> tuple[int, ...]:
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    if isinstance(module.padding, str):  # "same"
        return tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return tuple(int(one) for one in module.padding)


@dataclass(frozen=True, eq=False)
class LayerTable:
    """Milliseconds of one layer over its widths.

    Attributes:
        outputs_O, inputs_I: the grid, ascending.
        ms_OI: times on it.
        odd_out, odd_in: factor for each remainder of a width, the period being their length (1 for round widths).
    """

    outputs_O: tuple[int, ...]
    inputs_I: tuple[int, ...]
    ms_OI: tuple[tuple[float, ...], ...]
    odd_out: tuple[float, ...] = (1.0,)
    odd_in: tuple[float, ...] = (1.0,)

    def __call__(self, outputs: float, inputs_: float) -> float:
        """Milliseconds at some widths."""
        straight = _bilinear(self, outputs, inputs_)
        return (
            straight * self.odd_out[round(outputs) % len(self.odd_out)] * self.odd_in[round(inputs_) % len(self.odd_in)]
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LayerTable:
        """The opposite of :meth:`to_json`."""
        plain = {key: tuple(one) for key, one in values.items()}
        plain["ms_OI"] = tuple(tuple(row) for row in values["ms_OI"])
        return cls(**plain)


def _bilinear(table: LayerTable, outputs: float, inputs_: float) -> float:
    rows = [float(numpy.interp(inputs_, table.inputs_I, row)) for row in table.ms_OI]
    return float(numpy.interp(outputs, table.outputs_O, rows))


def axis(width: int) -> tuple[int, ...]:
    """Round widths from the dense one down, ascending."""
    if width < SMALL:
        wanted = {width, *range(SMALL_BLOCK, width, SMALL_BLOCK), *([4] if width > 4 else [])}
    else:
        wanted = {width, SMALL_BLOCK}
        wanted |= {max(round(fraction * width / BLOCK), 1) * BLOCK for fraction in FRACTIONS[1:]}
        wanted |= {(width - 1) // BLOCK * BLOCK}
    return tuple(sorted(one for one in wanted if one <= width))


def _odd(width: int) -> list[int]:
    """Widths of every remainder, next to the dense width."""
    block = SMALL_BLOCK if width < SMALL else BLOCK
    base = (width - 1) // block * block
    if base < 1 or width < 2 * block:
        return []
    return [base - block + remainder for remainder in range(1, block)]


def measure_table(shape: LayerShape, runtime: Runtime, name: str, threads: int) -> LayerTable:
    """Time a layer on its grid.

    Args:
        shape: the layer.
        runtime, name: where, and its registered name.
        threads: threads within an operator.

    Raises:
        ConfigError, ModelError: the runtime is not there, or cannot run it.
    """
    timer: Timer = lookup("layer_timer", name) if name in names("layer_timer") else time_modules
    dense = (shape.outputs, shape.inputs)
    if shape.kind == "grouped":  # widths of tied groups: time as multiply-accumulates go
        ms = timer(shape, [dense], runtime, threads)[0]
        return LayerTable((0, dense[0]), (0, dense[1]), ((0.0, 0.0), (0.0, ms)))
    if shape.kind == "depthwise":
        return _measure_line(shape, timer, runtime, threads)
    outputs, inputs_ = axis(dense[0]), axis(dense[1])
    odd_out, odd_in = _odd(dense[0]), _odd(dense[1])
    points = [(o, i) for o in outputs for i in inputs_]
    extra = [(o, dense[1]) for o in odd_out] + [(dense[0], i) for i in odd_in]
    times = timer(shape, points + extra, runtime, threads)
    grid = [tuple(times[row * len(inputs_) : (row + 1) * len(inputs_)]) for row in range(len(outputs))]
    table = LayerTable(outputs, inputs_, tuple(grid))
    beyond = [ms / max(_bilinear(table, *at), 1e-9) for at, ms in zip(extra, times[len(points) :], strict=True)]
    return dataclasses.replace(
        table, odd_out=_factors(odd_out, beyond[: len(odd_out)]), odd_in=_factors(odd_in, beyond[len(odd_out) :])
    )


def _measure_line(shape: LayerShape, timer: Timer, runtime: Runtime, threads: int) -> LayerTable:
    """A depthwise convolution has one width."""
    widths, odd = axis(shape.outputs), _odd(shape.outputs)
    times = timer(shape, [(width, width) for width in (*widths, *odd)], runtime, threads)
    table = LayerTable(widths, (shape.inputs,), tuple((ms,) for ms in times[: len(widths)]))
    beyond = [
        ms / max(_bilinear(table, at, shape.inputs), 1e-9) for at, ms in zip(odd, times[len(widths) :], strict=True)
    ]
    return dataclasses.replace(table, odd_out=_factors(odd, beyond))


def _factors(widths: Sequence[int], beyond: Sequence[float]) -> tuple[float, ...]:
    """Factor for each remainder; small differences are noise."""
    if not widths:
        return (1.0,)
    period = len(widths) + 1
    found = {width % period: ratio for width, ratio in zip(widths, beyond, strict=True)}
    return tuple(1.0 if abs(found.get(one, 1.0) - 1) < 0.03 else max(found[one], 0.9) for one in range(period))


# --- timers ---------------------------------------------------------------------------------------------------------


def least_ms(run: Callable[[], Any]) -> float:
    """The shortest of several runs: what disturbs a run only makes it longer."""
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


def layer_shapes(
    model: nn.Module, example_inputs: Any, layers: Sequence[str], forward_fn: inputs.ForwardFn | None = None
) -> dict[str, LayerShape]:
    """The shape of each layer by name, from one forward pass in eval mode; layers that are not reached are left out.

    Raises:
        ModelError: the model rejects the inputs.
    """
    found: dict[str, LayerShape] = {}

    def listener(name: str) -> Callable[[nn.Module, Any], None]:
        def hear(module: nn.Module, given: Any) -> None:
            shape = shape_of(module, given[0]) if given and isinstance(given[0], Tensor) else None
            if shape is not None:
                found[name] = shape

        return hear

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(listener(name)) for name in layers if name in modules]
    try:
        with torch.no_grad(), inputs.evaluating(model), exporters.without_attention_fastpath():
            inputs.checked_call(model, example_inputs, forward_fn)
    finally:
        for handle in handles:
            handle.remove()
    return found
