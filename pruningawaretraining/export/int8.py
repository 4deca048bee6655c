"""8-bit integers by onnxruntime's static quantization: per channel or per tensor, some layers left in float32."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor, nn

from pruningawaretraining.errors import ConfigError, ModelError, unknown
from pruningawaretraining.export.precision import Batches, Converted, saved
from pruningawaretraining.registry import register
from pruningawaretraining.runtimes.flat_model import FlatGraph
from pruningawaretraining.runtimes.ort import as_arrays, checked_run, open_session, require

logger = logging.getLogger(__name__)

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
QDQ = ("QuantizeLinear", "DequantizeLinear")
ALL_LEFT = "exclude: %d of %d layers stay in float32, so nothing of the file is in 8 bits. Allowed: fewer"
SAMPLE = 1
"""Batches that the layers' errors are measured on."""


@register("precision", "int8")
@dataclass(frozen=True)
class Int8:
    """onnxruntime's static quantization, with quantize and dequantize nodes around operators.

    Args:
        per_channel: weights have a scale for each output channel; else one for all.
        exclude: layers that stay in float32, by the names of the model's modules (of one that holds others: all in it)
            or of the graph's nodes; or how many of the worst, which takes one more quantization for every layer of the
            model.
        agreement: below this a warning says how often the file agrees with the model on ``calibration``.
    """

    tolerance: ClassVar[float] = 0.25
    compared_on_data: ClassVar[bool] = True

    per_channel: bool = True
    exclude: int | Sequence[str] = ()
    agreement: float = 0.98

    def __post_init__(self) -> None:
        if not isinstance(self.per_channel, bool):
            raise ConfigError(f"per_channel: {self.per_channel!r} is not allowed. Allowed: True, False")
        counts = isinstance(self.exclude, int) and not isinstance(self.exclude, bool) and self.exclude >= 0
        listed = isinstance(self.exclude, (list, tuple)) and all(isinstance(one, str) for one in self.exclude)
        if not counts and not listed:
            raise ConfigError(f"exclude: {self.exclude!r} is not allowed. Allowed: names of layers, or how many")
        if isinstance(self.agreement, bool) or not 0 <= self.agreement <= 1:
            raise ConfigError(f"agreement: {self.agreement!r} is not allowed. Allowed: a number in [0, 1]")

    def check(self, graph: FlatGraph, batches: Batches) -> None:
        """See :class:`~pruningawaretraining.export.precision.Precision`.

        Raises:
            ConfigError: there are no batches, a package is missing, or a layer is not one of the model.
            ModelError: a batch is not finite.
        """
        if not batches:
            raise ConfigError(
                'calibration: precision="int8" needs data. Allowed: batches in the form of example_inputs'
            )
        for number, tensors in enumerate(batches):
            for name, one in zip(graph.input_names, tensors, strict=True):
                if one.is_floating_point() and not bool(torch.isfinite(one).all()):
                    raise ModelError(f"calibration[{number}]: {name} has values that are not finite. Expected: finite")
        require("onnxruntime.quantization")
        layers = _weighted(next(graph.module.children()))
        for name in [] if isinstance(self.exclude, int) else self.exclude:
            if not name.startswith(("/", "node_")) and not any(_lies_in(layer, name) for layer in layers):
                raise ConfigError(unknown("exclude", name, layers, most=10))

    def convert(self, written: Path, graph: FlatGraph, batches: Batches) -> Converted:
        """See :class:`~pruningawaretraining.export.precision.Precision`.

        Raises:
            ConfigError: a layer to exclude has no weights in the graph, or more are to be excluded than there are.
        """
        prepared, target = written.with_name("prepared.onnx"), written.with_name("int8.onnx")
        whole = saved(require("onnx").load(str(written)), written.with_name("whole.onnx"))
        require("onnxruntime.quantization.shape_inference").quant_pre_process(
            str(whole), str(prepared), skip_symbolic_shape=True
        )
        nodes = layer_nodes(require("onnx").load(str(prepared), load_external_data=False))
        errors: dict[str, float] = {}
        if isinstance(self.exclude, int):
            if self.exclude > len(nodes):
                raise ConfigError(f"exclude: {self.exclude} layers, and the model has {len(nodes)}. Allowed: fewer")
            errors = self._errors(prepared, graph, batches[:SAMPLE], nodes) if self.exclude else {}
            left = list(errors)[: self.exclude]
        else:
            left = list(dict.fromkeys(layer for name in self.exclude for layer in _known(name, nodes)))
        if left and len(left) == len(nodes):
            logger.warning(ALL_LEFT, len(left), len(nodes))
        self._quantize(prepared, target, graph, batches, exclude=[nodes[name] for name in left])
        if left:
            _with_float_inputs(target, prepared, {nodes[name] for name in left})
        return Converted(target, tuple(left), errors)

    def _quantize(
        self, prepared: Path, target: Path, graph: FlatGraph, batches: Batches, **nodes: Sequence[str]
    ) -> None:
        require("onnxruntime.quantization").quantize_static(
            str(prepared),
            str(target),
            _Reader(graph, batches),
            per_channel=self.per_channel,
            reduce_range=_reduced(),
            extra_options={"QDQKeepRemovableActivations": "exclude" in nodes and bool(nodes["exclude"])},
            **{f"nodes_to_{key}": list(names) for key, names in nodes.items()},
        )

    def _errors(self, prepared: Path, graph: FlatGraph, batches: Batches, nodes: Mapping[str, str]) -> dict[str, float]:
        """Error of the outputs with one layer alone in 8 bits, relative to them (root mean squares); worst first."""
        expected = _outputs(prepared, graph, batches)
        scale = math.sqrt(sum(float(numpy.square(one).sum()) for one in expected)) or 1.0
        found, target = {}, prepared.with_name("one.onnx")
        for name, node in nodes.items():
            self._quantize(prepared, target, graph, batches, quantize=[node])
            gaps = zip(expected, _outputs(target, graph, batches), strict=True)
            found[name] = math.sqrt(sum(float(numpy.square(a - b).sum()) for a, b in gaps)) / scale
        return dict(sorted(found.items(), key=lambda one: -one[1]))


def _with_float_inputs(path: Path, prepared: Path, excluded: set[str]) -> None:
    """Let layers that stay in float32 read what was there before it was quantized.

    Between quantized neighbours onnxruntime would quantize their weights after all, when it loads the file.
    """
    onnx = require("onnx")
    model = onnx.load(str(path))
    graph = model.graph
    maker = {name: node for node in graph.node for name in node.output}
    before = {
        name: node.op_type
        for node in onnx.load(str(prepared), load_external_data=False).graph.node
        for name in node.output
    }
    for node in (one for one in graph.node if one.name in excluded):
        back = maker.get(node.input[0])
        there = None if back is None or back.op_type != "DequantizeLinear" else maker.get(back.input[0])
        if there is None or there.op_type != "QuantizeLinear":
            continue
        given = there.input[0]
        if given not in maker or maker[given].op_type == before.get(given):  # else an activation lies in the rounding
            node.input[0] = given
    while True:
        read = {name for node in graph.node for name in node.input} | {one.name for one in graph.output}
        idle = [node for node in graph.node if node.op_type in QDQ and not read & set(node.output)]
        if not idle:
            break
        for node in idle:
            graph.node.remove(node)
    saved(model, path)


def layer_nodes(model: Any) -> dict[str, str]:
    """Layer -> node, of every node of an ONNX graph that has a weight; a node whose layer is not known, by itself."""
    constants = {one.name for one in model.graph.initializer}
    nodes = [one for one in model.graph.node if one.op_type in WEIGHTED and constants & set(one.input[1:2])]
    found: dict[str, str] = {}
    for one in nodes:
        layer = _layer(one.name, one.input[1])
        found[one.name if layer in found else layer] = one.name
    return found


def _layer(node: str, weight: str) -> str:
    """The module of a node: by the name of its weight, or by the scopes in its own."""
    if weight.startswith("model.") and weight.endswith(".weight"):
        return weight.removeprefix("model.").removesuffix(".weight")
    scopes = node.strip("/").split("/")[:-1]
    if not node.startswith("/model/") or len(scopes) < 2:
        return node
    names: list[str] = []
    for scope in scopes:  # a scope within a sequence repeats the one before: stages, stages.2, stages.2.0
        if names and scope.startswith(f"{names[-1]}."):
            names[-1] = scope
        else:
            names.append(scope)
    return ".".join(names).removeprefix("model.")


def _weighted(model: nn.Module) -> list[str]:
    """The modules that hold a weight of their own to multiply with."""
    return [
        name
        for name, module in model.named_modules()
        if name
        and not isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        and any(one.ndim > 1 for one in module.parameters(recurse=False))
    ]


def _lies_in(layer: str, name: str) -> bool:
    """Whether a layer is the module of that name, or in it."""
    return layer == name or layer.startswith(f"{name}.")


def _known(name: str, nodes: Mapping[str, str]) -> list[str]:
    """The layers of a name, which may be that of a module around them, or of a node."""
    found = [layer for layer, node in nodes.items() if _lies_in(layer, name) or node == name]
    if not found:
        raise ConfigError(unknown("exclude", name, nodes, most=10))
    return found


def _outputs(path: Path, graph: FlatGraph, batches: Batches) -> list[Any]:
    """Outputs of an ONNX file on the batches, one after the other."""
    session = open_session(str(path))
    found: list[Any] = []
    for tensors in batches:
        found += checked_run(session, as_arrays(session, dict(zip(graph.input_names, tensors, strict=True))))
    return [one.astype(numpy.float64) for one in found if one.dtype.kind == "f"]


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
