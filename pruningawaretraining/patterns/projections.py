"""Projections of attention blocks: what they are called, and which heads their rows belong to.

Shape suffixes: ``_D`` entries of one dimension of a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

FUSED = ("qkv", "c_attn", "qkv_proj", "Wqkv", "to_qkv", "in_proj")
INTERLEAVED = ("query_key_value",)
"""Fused projections that hold query, key and value of one head side by side (GPT-NeoX, BLOOM)."""
QUERY = ("q_proj", "query", "q", "q_lin", "to_q", "wq", "q_attn", "query_proj")
KEY = ("k_proj", "key", "k", "k_lin", "to_k", "wk", "key_proj")
VALUE = ("v_proj", "value", "v", "v_lin", "to_v", "wv", "value_proj")
OUTPUT = ("out_proj", "o_proj", "proj", "o", "out_lin", "c_proj", "dense", "to_out", "wo")
OUTPUT_BESIDE = ("output.dense", "output", "dense")
"""The output projection where a sibling of the block has it (BERT)."""
GATE = ("gate", "g_proj")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "num_q_heads")
HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_head", "dim_per_head", "head_size", "key_dim")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
REPETITIONS = ("num_key_value_groups", "n_rep")
WIDTHS = ("all_head_size", "all_head_dim", "inner_dim", "attn_dim", "split_size", "inner_kv_dim")


@dataclass(frozen=True, eq=False)
class HeadTensor:
    """A tensor that has something of every head along one dimension.

    Args:
        name, tensor: the tensor and its name in the model.
        dim: the dimension.
        heads_D: number of the head that each entry belongs to.
        shared: whether they are key and value heads, which several query heads may share.
        role: see :class:`pruningawaretraining.groups.grouping.Member`.
    """

    name: str
    tensor: Tensor
    dim: int
    heads_D: Tensor
    shared: bool
    role: str


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear layer with its name; Conv1D of transformers has outputs in the last dimension of its weight."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight

    @property
    def out_dim(self) -> int:
        return 1 if is_transposed_linear(self.module) else 0

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[self.out_dim])

    @property
    def inputs(self) -> int:
        return int(self.weight.shape[1 - self.out_dim])


def is_transposed_linear(module: object) -> bool:
    """Whether a module is a linear layer with a weight of (inputs, outputs), such as transformers' ``Conv1D``."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2 and hasattr(module, "nf")
    )


def is_projection(module: object) -> TypeGuard[nn.Module]:
    """Whether a module is a linear layer, in either layout."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Module) and is_transposed_linear(module))


def spread(heads: int, width: int, start: int = 0) -> Tensor:
    """The head of every entry where each head has ``width`` in a row."""
    return torch.arange(start, start + heads).repeat_interleave(width)


def projection_in(name: str, module: nn.Module, names: Iterable[str]) -> Projection | None:
    """The first child of a block that goes by one of these names and is a projection."""
    for attribute in names:
        child = getattr(module, attribute, None)
        if attribute == "to_out" and isinstance(child, nn.Sequential) and len(child):
            attribute, child = "to_out.0", child[0]
        if is_projection(child):
            return Projection(f"{name}.{attribute}" if name else attribute, child)
    return None


Pieces = list[tuple[Tensor, bool]]  # heads of a run of outputs, and whether they are key and value heads


def projected(one: Projection, pieces: Pieces) -> Iterator[HeadTensor]:
    """The outputs of a projection; runs of query heads and of key and value heads are parts of their own."""
    bias = getattr(one.module, "bias", None)
    for shared in (False, True):
        if not any(kind is shared for _, kind in pieces):
            continue
        heads_D = torch.cat([heads if kind is shared else torch.full_like(heads, -1) for heads, kind in pieces])
        yield HeadTensor(f"{one.name}.weight", one.weight, one.out_dim, heads_D, shared, "out")
        if isinstance(bias, Tensor):
            yield HeadTensor(f"{one.name}.bias", bias, 0, heads_D, shared, "bias")
