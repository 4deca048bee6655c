"""ONNX exporters: "dynamo" (torch.export, the newer) and "torchscript" (tracing)."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pruningawaretraining.errors import ModelError
from pruningawaretraining.models.calling import evaluating
from pruningawaretraining.registry import lookup, register
from pruningawaretraining.runtimes.exporter_choice import AUTO, chosen_exporter
from pruningawaretraining.runtimes.flat_model import BATCH, FlatGraph
from pruningawaretraining.runtimes.ort import require

_NOISY_LOGGERS = ("torch.onnx", "torch.export", "torch._export", "torch.fx", "onnxscript", "onnx_ir")
OPSETS = {"dynamo": (14, 26), "torchscript": (7, 23)}
"""As tried with torch 2.15 and onnx 1.23: of a linear layer and a ReLU."""


@register("exporter", "dynamo", "torch.export")
def _export_dynamo(graph: FlatGraph, path: Path, opset: int | None) -> None:
    """The exporter on top of torch.export."""
    shapes = dynamic_shapes(graph)
    program = torch.onnx.export(
        graph.module, graph.inputs, dynamo=True, input_names=list(graph.input_names), verbose=False,
        output_names=list(graph.output_names), dynamic_shapes=shapes, opset_version=opset, optimize=True,
    )  # fmt: skip
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    program.save(str(path), external_data=True)


def dynamic_shapes(graph: FlatGraph) -> tuple[Any, ...] | None:
    """The free dimensions by place, as torch.export takes them, or None; names would be the graph's to PyTorch 2.6."""
    known = {name: torch.export.Dim(name) for axes in graph.axes.values() for name in axes.values()}
    if not known:
        return None
    shapes = ({dim: known[name] for dim, name in graph.axes.get(one, {}).items()} or None for one in graph.input_names)
    return (tuple(shapes),)


@register("exporter", "torchscript", "trace", "legacy")
def _export_torchscript(graph: FlatGraph, path: Path, opset: int | None) -> None:
    """The older exporter: tracing."""
    axes: dict[str, Any] = {name: dict(named) for name, named in graph.axes.items()}
    if graph.dynamic:
        axes.update({name: {0: BATCH} for name in graph.output_names})
    torch.onnx.export(
        graph.module, graph.inputs, str(path), dynamo=False, input_names=list(graph.input_names), verbose=False,
        output_names=list(graph.output_names), dynamic_axes=axes or None, opset_version=opset,
    )  # fmt: skip


def export_graph(graph: FlatGraph, path: Path, exporter: str = AUTO, opset: int | None = None) -> None:
    """Write the graph with the exporter of this name, quietly; nothing is checked here.

    Raises:
        ConfigError: unknown exporter, or a package it needs is not installed.
        ModelError: the exporter cannot express the model.
    """
    name = chosen_exporter(exporter)
    write: Callable[[FlatGraph, Path, int | None], None] = lookup("exporter", name)
    require("onnx")
    require("onnxscript")
    try:
        with torch.no_grad(), evaluating(graph.module), without_attention_fastpath(), _quiet():
            write(graph, path, opset)
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, KeyError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fixed = " If the model fixes its batch size, pass dynamic_batch=False." if graph.dynamic else ""
        other = "torchscript" if name == "dynamo" else "dynamo"
        known = "" if opset is None else f" Opsets: {opsets()}."
        kind = type(next(graph.module.children())).__name__
        raise ModelError(
            f"exporter {name!r} cannot export {kind}: {reason}.{fixed}{known} Or try exporter={other!r}"
        ) from error


def opsets() -> str:
    """The opsets that each exporter writes of simple layers, for messages."""
    return ", ".join(f"{name!r} mostly {least} to {most}" for name, (least, most) in OPSETS.items())


@contextlib.contextmanager
def without_attention_fastpath() -> Iterator[None]:
    """Fused attention of nn.TransformerEncoderLayer off inside the block: no exporter can express it."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' warnings and log lines off inside the block; errors still come out as exceptions."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
