"""Attention blocks of a model: the tensors that hold their heads, and the order of heads.

Shape suffixes: ``_D`` entries of one dimension of a tensor.

A block is read by what its parts are called and how wide they are: ``nn.MultiheadAttention``; one fused projection
(timm, torchvision, GPT-2); or separate ones (transformers). Whether it was read rightly shows when a removal of heads
is rehearsed: the masked model and the removed one have to agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruningawaretraining.config.computed_weights import PARAMETRIZED
from pruningawaretraining.models.fake_quant import is_converted
from pruningawaretraining.patterns.projections import (
    FUSED,
    GATE,
    HEAD_DIM,
    HEADS,
    INTERLEAVED,
    KEY,
    KEY_VALUE_HEADS,
    OUTPUT,
    OUTPUT_BESIDE,
    QUERY,
    REPETITIONS,
    VALUE,
    WIDTHS,
    HeadTensor,
    Pieces,
    Projection,
    is_projection,
    projected,
    projection_in,
    spread,
)


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention block.

    Args:
        name: the module that splits heads.
        module: that module.
        heads, key_value_heads, head_dim: numbers of query heads and of key and value heads, and their width.
        parts: the tensors that hold them.
        layers: names of the modules that belong to it.
        tie: blocks with equal ties have to keep the same heads ("" for none): their position bias is shared.
    """

    name: str
    module: nn.Module
    heads: int
    key_value_heads: int
    head_dim: int
    parts: tuple[HeadTensor, ...]
    layers: tuple[str, ...]
    tie: str = ""


def attention_blocks(model: nn.Module) -> tuple[list[Attention], dict[str, str]]:
    """The attention blocks of a model, and the modules that look like one and cannot be read, with the reason."""
    modules = dict(model.named_modules())
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found: list[Attention] = []
    unread: dict[str, str] = {}
    for name, module in modules.items():
        read = _multihead(name, module) if isinstance(module, nn.MultiheadAttention) else _block(name, module, modules)
        if isinstance(read, Attention):
            problem = _problem(read, owners)
            if problem:
                unread[name] = problem
            else:
                found.append(read)
        elif read:
            unread[name] = read
    return found, unread


def _problem(block: Attention, owners: Counter[int]) -> str:
    for part in block.parts:
        if owners[id(part.tensor)] > 1:
            return f"{part.name} is shared with another module"
        if is_converted(part.tensor):
            return f"{part.name} is quantized already; prune before it is converted"
    return ""


def _multihead(name: str, module: nn.MultiheadAttention) -> Attention | str:
    heads, width = module.num_heads, module.head_dim
    prefix = f"{name}." if name else ""
    if any(nn.utils.parametrize.is_parametrized(one) for one in (module, module.out_proj)):
        return f"its weight is parametrized; {PARAMETRIZED} first makes it prunable"
    rows = spread(heads, width)
    parts: list[HeadTensor] = []
    for attribute, dim, heads_D, role in (
        ("in_proj_weight", 0, rows.repeat(3), "out"),
        ("q_proj_weight", 0, rows, "out"),
        ("k_proj_weight", 0, rows, "out"),
        ("v_proj_weight", 0, rows, "out"),
        ("in_proj_bias", 0, rows.repeat(3), "bias"),
        ("bias_k", 2, rows, "raw"),
        ("bias_v", 2, rows, "raw"),
    ):
        tensor = getattr(module, attribute)
        if tensor is not None:
            parts.append(HeadTensor(f"{prefix}{attribute}", tensor, dim, heads_D, False, role))
    parts.append(HeadTensor(f"{prefix}out_proj.weight", module.out_proj.weight, 1, rows, False, "in"))
    return Attention(name, module, heads, heads, width, tuple(parts), (name, f"{prefix}out_proj"))


def _output(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> Projection | None:
    inside = projection_in(name, module, OUTPUT)
    if inside is not None or not name:
        return inside
    parent = name.rpartition(".")[0]
    for suffix in OUTPUT_BESIDE:
        beside = f"{parent}.{suffix}" if parent else suffix
        if is_projection(modules.get(beside)):
            return Projection(beside, modules[beside])
    return None


def _block(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> Attention | str:
    """A block of projections; a reason where it looks like one and cannot be read; "" where it does not."""
    fused, interleaved = projection_in(name, module, FUSED), projection_in(name, module, INTERLEAVED)
    separate = [projection_in(name, module, names) for names in (QUERY, KEY, VALUE)]
    inputs = [fused or interleaved] if fused or interleaved else separate
    if not all(inputs):
        return ""
    output = _output(name, module, modules)
    known = [one for one in inputs if one is not None]
    if output is None:
        return "it has no output projection that is known by its name"
    if any(nn.utils.parametrize.is_parametrized(one.module) for one in [*known, output]):
        return f"its weight is parametrized; {PARAMETRIZED} first makes it prunable"
    width = _head_dim(module, output.inputs)
    if not width or output.inputs % width:
        return f"{output.inputs} inputs of {output.name} and no number of heads that divides them"
    heads = output.inputs // width
    shared = _key_value_heads(known, heads, width)
    if not shared or heads % shared:
        return f"{known[-1].outputs} outputs of {known[-1].name} do not fit {heads} heads of {width}"
    rows = _rows(known, heads, shared, width, interleaved is not None and fused is None)
    parts = [part for one, pieces in zip(known, rows, strict=True) for part in projected(one, pieces)]
    parts += _along_inputs(output, spread(heads, width))
    parts += _own_tensors(name, module, heads, width, {part.name for part in parts})
    layers = (name, *(one.name for one in known), output.name)
    return Attention(name, module, heads, shared, width, tuple(parts), layers, _tie(name, module))


def _head_dim(module: nn.Module, total: int) -> int:
    counts = [value for key in HEADS if isinstance(value := module.__dict__.get(key), int) and value > 0]
    widths = [value for key in HEAD_DIM if isinstance(value := module.__dict__.get(key), int) and value > 0]
    if counts and total % counts[0] == 0 and (not widths or widths[0] * counts[0] == total):
        return total // counts[0]
    return widths[0] if widths else 0


def _key_value_heads(inputs: list[Projection], heads: int, width: int) -> int:
    """Number of key and value heads; 0 if the widths do not determine it."""
    if len(inputs) == 3:
        query, key, value = (one.outputs for one in inputs)
        return key // width if query == heads * width and key == value and key % width == 0 else 0
    extra = inputs[0].outputs - heads * width
    return extra // (2 * width) if extra > 0 and extra % (2 * width) == 0 else 0


def _rows(inputs: list[Projection], heads: int, shared: int, width: int, interleaved: bool) -> list[Pieces]:
    query, key = spread(heads, width), spread(shared, width)
    if len(inputs) == 3:
        return [[(query, False)], [(key, True)], [(key, True)]]
    if interleaved:
        return [[(spread(heads, 3 * width), False)]]
    return [[(query, False), (key, True), (key, True)]]


def _along_inputs(output: Projection, heads_D: Tensor) -> list[HeadTensor]:
    return [HeadTensor(f"{output.name}.weight", output.weight, 1 - output.out_dim, heads_D, False, "in")]


def _own_tensors(name: str, module: nn.Module, heads: int, width: int, known: set[str]) -> Iterator[HeadTensor]:
    """Gates, biases of relative positions, temperatures: what else has one entry, or a head's width, for every head."""
    gate = projection_in(name, module, GATE)
    if gate is not None and gate.outputs == heads * width:
        yield from projected(gate, [(spread(heads, width), False)])
    prefix = f"{name}." if name else ""
    for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and tensor.is_floating_point() and f"{prefix}{attribute}" not in known:
            yield from _raw(f"{prefix}{attribute}", tensor, heads, width)
    for attribute, child in module.named_children():
        if isinstance(child, nn.Embedding) and child.embedding_dim == heads:
            yield HeadTensor(f"{prefix}{attribute}.weight", child.weight, 1, torch.arange(heads), False, "raw")
        elif (
            isinstance(child, nn.Sequential)
            and len(child)
            and isinstance(child[-1], nn.Linear)
            and child[-1].out_features == heads
        ):
            last = Projection(f"{prefix}{attribute}.{len(child) - 1}", child[-1])  # an MLP that makes position biases
            yield from projected(last, [(torch.arange(heads), False)])
        elif not isinstance(child, (nn.Linear, nn.modules.conv._ConvNd)):
            for own, tensor in child._parameters.items():
                if tensor is not None and "relative" in own:
                    yield from _raw(f"{prefix}{attribute}.{own}", tensor, heads, width)


def _raw(name: str, tensor: Tensor, heads: int, width: int) -> Iterator[HeadTensor]:
    learned = isinstance(tensor, nn.Parameter)
    sizes = {heads * width: spread(heads, width)}
    if learned:
        sizes[heads] = torch.arange(heads)
    for size, heads_D in sizes.items():
        dims = [dim for dim, length in enumerate(tensor.shape) if length == size]
        if len(dims) == 1:
            role = "raw" if learned else "buffer"
            yield HeadTensor(name, tensor, dims[0], heads_D, False, role)
            return


def _tie(name: str, module: nn.Module) -> str:
    """Blocks of a T5 stack take the position bias of their first one, so their heads are the same."""
    if "has_relative_attention_bias" not in module.__dict__:
        return ""
    stack, marker, rest = name.partition(".block.")
    return f"{stack}{marker}*.{rest.rpartition('.')[2]}" if marker else ""


def scaled_attributes(block: Attention, group_is_query: bool) -> tuple[str, ...]:
    """Attributes of the block's module that shrink in proportion to its heads.

    Args:
        block: the block.
        group_is_query: query heads go and key and value heads stay.
    """
    if isinstance(block.module, nn.MultiheadAttention):
        return ("num_heads",)
    values = {
        **dict.fromkeys(HEADS, block.heads),
        **dict.fromkeys(WIDTHS, block.heads * block.head_dim),
        **(
            dict.fromkeys(REPETITIONS, block.heads // block.key_value_heads)
            if group_is_query
            else dict.fromkeys(KEY_VALUE_HEADS, block.key_value_heads)
        ),
    }
    return tuple(key for key, value in values.items() if block.module.__dict__.get(key) == value)
