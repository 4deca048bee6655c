"""A model as a flat graph: a module of positional tensors that returns a tuple of tensors, with a name for each.

Whatever the model takes and returns, exporters see only this.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.errors import ConfigError, ModelError, unknown
from pruningawaretraining.models.calling import REJECTED, call_as_is, checked_call, evaluating, move
from pruningawaretraining.models.compiling import uncompiled
from pruningawaretraining.models.trees import tensors_of, with_tensors

BATCH = "batch"


@dataclass(frozen=True)
class FlatGraph:
    """Input of an exporter: a module of flat tensors, their names, and which of them carry the batch.

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
            return tuple(tensors_of(call_as_is(self.model, with_tensors(self._example, tensors))))


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
) -> FlatGraph:
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
    free = {name: {0: BATCH} for name, carries in zip(names, batched, strict=True) if carries} if dynamic else {}
    axes = _with_free_axes(free, dynamic_axes or {}, dict(zip(names, tensors, strict=True)))
    graph = FlatGraph(_Flat(model, example_inputs), tuple(tensors), names, output_names, batched, dynamic, axes)
    _check_sizes(graph, dynamic_axes or {})
    return graph


def _with_free_axes(
    axes: Mapping[str, Mapping[int, str]], wanted: Mapping[str, Mapping[int, str]], inputs: Mapping[str, Tensor]
) -> dict[str, dict[int, str]]:
    """Check and add the dimensions that the user asked to be dynamic."""
    found = {name: dict(by_dim) for name, by_dim in axes.items()}
    for name, by_dim in wanted.items():
        if name not in inputs:
            raise ConfigError(f"dynamic_axes: {unknown('input', name, inputs)}")
        _check_axes(name, by_dim)
        dims = inputs[name].ndim
        bad = [dim for dim in by_dim if not (isinstance(dim, int) and 0 <= dim < dims)]
        if bad:
            raise ConfigError(f"dynamic_axes.{name}: {bad[0]!r} is not a dimension. Allowed: 0 to {dims - 1}")
        found[name] = {**axes.get(name, {}), **by_dim}
    return found


def _check_axes(name: str, wanted: Any) -> None:
    """Refuse anything but a mapping of dimensions to names."""
    if not isinstance(wanted, Mapping):
        raise ConfigError(
            f'dynamic_axes.{name}: {wanted!r} names nothing. Allowed: dimension -> name, as {{2: "height"}}'
        )
    for dim, axis in wanted.items():
        if not isinstance(axis, str) or not axis.isidentifier() or keyword.iskeyword(axis):
            raise ConfigError(
                f"dynamic_axes.{name}: {axis!r}, of dimension {dim!r}, is not a name. Allowed: letters, digits and _, "
                "the first no digit"
            )


def _check_sizes(graph: FlatGraph, wanted: Mapping[str, Mapping[int, str]]) -> None:
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


def _takes(graph: FlatGraph, axis: str, size: int) -> bool:
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


def batch_of(graph: FlatGraph, example_inputs: Any, batch: Any, key: str) -> tuple[Tensor, ...]:
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
