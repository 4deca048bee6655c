"""A model as an ONNX graph: named inputs and outputs, the exporters, and a session that runs the graph.

Two exporters are registered, "dynamo" (torch.export, the newer) and "torchscript" (tracing). Whatever the model takes
and returns, they see a module of positional tensors that returns a tuple of tensors, with one name for each.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import inspect
import keyword
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.compiled import uncompiled
from pruningawaretraining.errors import ConfigError, ModelError, unknown
from pruningawaretraining.exporters import AUTO, chosen_exporter
from pruningawaretraining.inputs import REJECTED, call_as_is, checked_call, evaluating, move, tensors_of
from pruningawaretraining.registry import lookup, register

_NOISY_LOGGERS = ("torch.onnx", "torch.export", "torch._export", "torch.fx", "onnxscript", "onnx_ir")
BATCH = "batch"
OPSETS = {"dynamo": (14, 26), "torchscript": (7, 23)}
"""As tried with torch 2.15 and onnx 1.23: of a linear layer and a ReLU."""
ON_CPU = ("CPUExecutionProvider",)


@dataclass(frozen=True)
class Graph:
    """What an exporter is given: a module of flat tensors, their names, and which of them carry the batch.

    Attributes:
        module: takes ``inputs`` positionally, returns a tuple of tensors in the order of ``output_names``.
        inputs: the example tensors.
        batched: for each input, whether its dimension 0 is the batch.
        dynamic: whether the batch is a free dimension of the graph.
        axes: input -> dimension -> name, of all free dimensions, the batch among them.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    batched: tuple[bool, ...]
    dynamic: bool
    axes: Mapping[str, Mapping[int, str]] = dataclasses.field(default_factory=dict)


class _Flat(nn.Module):
    """The user's model behind positional tensors; the other arguments are frozen at their example values."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        super().__init__()
        self.model = model
        self._example = example_inputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        with uncompiled():
            return tuple(tensors_of(call_as_is(self.model, with_tensors(self._example, iter(tensors)))))


def with_tensors(nest: Any, tensors: Iterator[Tensor]) -> Any:
    """The same nest of lists, tuples, mappings and values with its tensors replaced, in order."""
    if isinstance(nest, Tensor):
        return next(tensors)
    if isinstance(nest, Mapping):
        return {key: with_tensors(value, tensors) for key, value in nest.items()}
    if isinstance(nest, (list, tuple)):
        items = [with_tensors(value, tensors) for value in nest]
        return type(nest)(*items) if hasattr(nest, "_fields") else type(nest)(items)
    return nest


def tensor_names(nest: Any, name: str) -> list[str]:
    """A name for each tensor of a nest, in order: ``output``, ``output_0``, or the keys of a mapping or dataclass."""
    if isinstance(nest, Tensor):
        return [name]
    if isinstance(nest, Mapping):
        return [found for key, value in nest.items() for found in tensor_names(value, str(key))]
    if dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        fields = [item.name for item in dataclasses.fields(nest)]
        return [found for key in fields for found in tensor_names(getattr(nest, key), key)]
    if isinstance(nest, (list, tuple)):
        keys = getattr(nest, "_fields", [f"{name}_{number}" for number in range(len(nest))])
        return [found for key, value in zip(keys, nest, strict=True) for found in tensor_names(value, key)]
    return []


def _unique(names: Sequence[str], taken: Sequence[str] = ()) -> tuple[str, ...]:
    """The names, with a number behind those that are already in use."""
    used, result = set(taken), []
    for name in names:
        candidate, number = name, 1
        while candidate in used:
            candidate, number = f"{name}_{number}", number + 1
        used.add(candidate)
        result.append(candidate)
    return tuple(result)


def _input_names(model: nn.Module, example_inputs: Any) -> tuple[str, ...]:
    if isinstance(example_inputs, Mapping):
        return _unique(tensor_names(example_inputs, "input"))
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [one.name for one in inspect.signature(model.forward).parameters.values() if one.kind in kinds]
    parameters += [f"input_{number}" for number in range(len(parameters), len(arguments))]
    pairs = zip(parameters[: len(arguments)], arguments, strict=True)
    return _unique([found for name, value in pairs for found in tensor_names(value, name)])


def resize_batch(tensor: Tensor, size: int) -> Tensor:
    """The tensor with ``size`` rows: its own, repeated as often as needed."""
    return tensor.repeat(-(-size // tensor.shape[0]), *[1] * (tensor.ndim - 1))[:size]


def build_graph(
    model: nn.Module,
    example_inputs: Any,
    dynamic_batch: bool = True,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
) -> Graph:
    """Flatten a model and its example inputs for an exporter. A model that is not on the CPU is copied there.

    Args:
        model: any module; it is called once, in eval mode.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs. The tensors whose first
            dimension equals that of the first tensor carry the batch.
        dynamic_batch: the graph takes any batch size; an example batch of 1 is then doubled, because an exporter
            takes a size of 1 for a constant.
        dynamic_axes: input -> dimension -> name, of more free dimensions: equal names are equal sizes.

    Raises:
        ConfigError: axes of an input or a dimension that is not there.
        ModelError: no tensor among the inputs or outputs, or the model rejects the inputs.
    """
    cpu = torch.device("cpu")
    if any(tensor.device != cpu for tensor in (*model.parameters(), *model.buffers())):
        model = copy.deepcopy(model).to(cpu)
    example_inputs = move(example_inputs, cpu)
    tensors = list(tensors_of(example_inputs))
    if not tensors:
        raise ModelError(f"example_inputs: {type(example_inputs).__name__} holds no tensor; give at least one")
    batch = tensors[0].shape[0] if tensors[0].ndim else -1
    batched = tuple(bool(tensor.ndim) and tensor.shape[0] == batch for tensor in tensors)
    with torch.no_grad(), evaluating(model):
        outputs = checked_call(model, example_inputs)
    names = _input_names(model, example_inputs)
    output_names = _unique(tensor_names(outputs, "output"), taken=names)
    if not output_names:
        raise ModelError(f"{type(model).__name__} returns {type(outputs).__name__}, in which no tensor was found")
    if dynamic_batch and batch == 1:
        pairs = zip(tensors, batched, strict=True)
        tensors = [resize_batch(tensor, 2) if carries else tensor for tensor, carries in pairs]
    dynamic = dynamic_batch and batch > 0
    axes = {name: {0: BATCH} for name, carries in zip(names, batched, strict=True) if carries} if dynamic else {}
    for name, wanted in (dynamic_axes or {}).items():
        if name not in names:
            raise ConfigError(f"dynamic_axes: {unknown('input', name, names)}")
        _check_axes(name, wanted)
        least = tensors[names.index(name)].ndim
        bad = [dim for dim in wanted if not (isinstance(dim, int) and 0 <= dim < least)]
        if bad:
            raise ConfigError(f"dynamic_axes.{name}: {bad[0]!r} is no dimension of it. Allowed: 0 to {least - 1}")
        axes[name] = {**axes.get(name, {}), **wanted}
    graph = Graph(_Flat(model, example_inputs), tuple(tensors), names, output_names, batched, dynamic, axes)
    _check_sizes(graph, dynamic_axes or {})
    return graph


def _check_axes(name: str, wanted: Any) -> None:
    """Refuse what is no mapping of dimensions to names."""
    if not isinstance(wanted, Mapping):
        raise ConfigError(
            f'dynamic_axes.{name}: {wanted!r} names nothing. Allowed: dimension -> name, as {{2: "height"}}'
        )
    for dim, axis in wanted.items():
        if not isinstance(axis, str) or not axis.isidentifier() or keyword.iskeyword(axis):
            raise ConfigError(
                f"dynamic_axes.{name}: {axis!r}, of dimension {dim!r}, is no name. Allowed: letters, digits and _, "
                "the first no digit"
            )


def _check_sizes(graph: Graph, wanted: Mapping[str, Mapping[int, str]]) -> None:
    """Refuse free dimensions of which the model takes one size only: exporters pass over them."""
    for name, axes in wanted.items():
        for dim, axis in axes.items():
            if dim == 0:
                continue
            size = graph.inputs[graph.input_names.index(name)].shape[dim]
            others = [other for other in (2 * size, size // 2, size + 1) if other > 0]
            if not any(_takes(graph, axis, other) for other in others):
                raise ConfigError(
                    f"dynamic_axes.{name}: dimension {dim} ({axis!r}) is {size}, and the model takes neither of "
                    f"{', '.join(map(str, others))}. Allowed: dimensions that may have several sizes"
                )


def _takes(graph: Graph, axis: str, size: int) -> bool:
    """Whether the model runs with another size of a free dimension."""
    tensors = list(graph.inputs)
    for number, name in enumerate(graph.input_names):
        for dim in (dim for dim, one in graph.axes.get(name, {}).items() if one == axis):
            index = torch.arange(size) % tensors[number].shape[dim]
            tensors[number] = tensors[number].index_select(dim, index)
    try:
        with torch.no_grad(), evaluating(graph.module):
            graph.module(*tensors)
    except REJECTED:
        return False
    return True


def batch_of(graph: Graph, example_inputs: Any, batch: Any, key: str) -> tuple[Tensor, ...]:
    """The tensors of a batch as the graph takes them; what comes after them, such as labels, is left out.

    Args:
        graph: of the model.
        example_inputs: what it was made from.
        batch: in their form, or a sequence that begins with them, or a mapping of the graph's inputs.
        key: for messages.

    Raises:
        ModelError: inputs are missing, or of other shapes or kinds.
    """
    names = graph.input_names
    if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], Mapping):
        batch = batch[0]
    if isinstance(batch, Mapping):
        nest = example_inputs if isinstance(example_inputs, Mapping) else dict.fromkeys(names, torch.empty(0))
        needed = [name for name, value in nest.items() if any(True for _ in tensors_of(value))]
        missing = [name for name in needed if name not in batch]
        if missing:
            raise ModelError(f"{key}: {missing[0]!r} is missing of {', '.join(map(str, batch))}. Expected: {needed}")
        batch = [batch[name] for name in needed]
    elif isinstance(example_inputs, Mapping):
        raise ModelError(f"{key}: a {type(batch).__name__}. Expected: a mapping with {', '.join(names)}")
    found = tuple(tensors_of(batch))[: len(names)]
    if len(found) < len(names):
        raise ModelError(f"{key}: {len(found)} tensors. Expected: {len(names)}, {', '.join(names)}")
    for name, example, tensor in zip(names, graph.inputs, found, strict=True):
        free = graph.axes.get(name, {})
        wanted = [free.get(dim, size) for dim, size in enumerate(example.shape)]
        fits = tensor.ndim == example.ndim and all(
            dim in free or size == tensor.shape[dim] for dim, size in enumerate(example.shape)
        )
        if not fits or tensor.dtype != example.dtype:
            raise ModelError(
                f"{key}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}. Expected: {example.dtype} of "
                f"({', '.join(map(str, wanted))})"
            )
    return found


@register("exporter", "dynamo", "torch.export")
def _export_dynamo(graph: Graph, path: Path, opset: int | None) -> None:
    """The exporter on top of torch.export."""
    shapes = dynamic_shapes(graph)
    program = torch.onnx.export(
        graph.module, graph.inputs, dynamo=True, input_names=list(graph.input_names), verbose=False,
        output_names=list(graph.output_names), dynamic_shapes=shapes, opset_version=opset, optimize=True,
    )  # fmt: skip
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    program.save(str(path), external_data=True)


def dynamic_shapes(graph: Graph) -> tuple[Any, ...] | None:
    """The free dimensions by place, as torch.export takes them, or None; names would be the graph's to PyTorch 2.6."""
    known = {name: torch.export.Dim(name) for axes in graph.axes.values() for name in axes.values()}
    if not known:
        return None
    shapes = ({dim: known[name] for dim, name in graph.axes.get(one, {}).items()} or None for one in graph.input_names)
    return (tuple(shapes),)


@register("exporter", "torchscript", "trace", "legacy")
def _export_torchscript(graph: Graph, path: Path, opset: int | None) -> None:
    """The older exporter: tracing."""
    axes: dict[str, Any] = {name: dict(named) for name, named in graph.axes.items()}
    if graph.dynamic:
        axes.update({name: {0: BATCH} for name in graph.output_names})
    torch.onnx.export(
        graph.module, graph.inputs, str(path), dynamo=False, input_names=list(graph.input_names), verbose=False,
        output_names=list(graph.output_names), dynamic_axes=axes or None, opset_version=opset,
    )  # fmt: skip


def export_graph(graph: Graph, path: Path, exporter: str = AUTO, opset: int | None = None) -> None:
    """Write the graph with the exporter of this name, quietly; nothing is checked here.

    Raises:
        ConfigError: unknown exporter, or a package it needs is not installed.
        ModelError: the exporter cannot express the model.
    """
    name = chosen_exporter(exporter)
    write: Callable[[Graph, Path, int | None], None] = lookup("exporter", name)
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


def require(package: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ConfigError: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"{package} is needed here and not installed: pip install {package}") from error


def open_session(model: str | bytes, threads: int = 0, providers: Sequence[Any] = ON_CPU) -> Any:
    """An onnxruntime session, by default on the CPU.

    Args:
        model: the path of an ONNX file, or its bytes.
        threads: threads within an operator; 0 leaves the choice to onnxruntime.
        providers: execution providers of onnxruntime, the preferred first.

    Raises:
        ConfigError: onnxruntime is not installed.
        ModelError: onnxruntime does not accept the file.
    """
    runtime = require("onnxruntime")
    options = session_options(threads)
    try:
        return runtime.InferenceSession(model, options, providers=list(providers))
    except session_errors() as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"onnxruntime cannot load {model if isinstance(model, str) else 'the graph'}: {reason}"
        ) from error


def session_options(threads: int = 0) -> Any:
    """Options of a session: quiet, and with so many threads within an operator (0: onnxruntime's own choice)."""
    options = require("onnxruntime").SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # several sessions take turns undisturbed
    return options


def session_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises for a graph or a feed that it cannot run; its errors have no common base of their own."""
    state = require("onnxruntime.capi.onnxruntime_pybind11_state")
    found = (value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception))
    return (*found, RuntimeError, ValueError)


def as_arrays(session: Any, feed: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a session is fed: arrays under the names of its inputs; what the graph does not use is left out."""
    known = {item.name for item in session.get_inputs()}
    return {name: tensor.detach().cpu().numpy() for name, tensor in feed.items() if name in known}


def checked_run(session: Any, arrays: Mapping[str, Any], hint: str = "") -> list[Any]:
    """The outputs of a session.

    Raises:
        ModelError: onnxruntime cannot run these inputs; the message names their shapes and ends with ``hint``.
    """
    try:
        outputs: list[Any] = session.run(None, dict(arrays))
    except session_errors() as error:
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"onnxruntime cannot run inputs of shape {shapes}: {reason}{hint}") from error
    return outputs


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
