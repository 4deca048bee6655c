"""Attention blocks with fewer heads: their attributes, and replacements for blocks of torch and torchvision.

Shape suffixes: ``_BTE`` batch, positions, width; ``_BHTC`` batch, heads, positions, width of a head; ``_BYXC`` images,
channels last; ``_BVUTC`` batch, rows and columns of windows, positions in a window, channels.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruningawaretraining.models.surgery import Surgery


@dataclass(frozen=True)
class Kept:
    """The kept part of a block.

    Args:
        heads, before: heads (or groups of them) that stay, and that there were.
        attributes: attributes of the block's module that shrink in proportion.
    """

    heads: int
    before: int
    attributes: tuple[str, ...] = ()


class PrunedMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose heads together are narrower than its inputs.

    PyTorch's own takes the width of all heads to be ``embed_dim``. This one has ``num_heads`` heads of ``head_dim``,
    parameters of the same names, and the same arguments and results.
    """

    @classmethod
    def of(cls, module: nn.MultiheadAttention) -> PrunedMultiheadAttention:
        """The same block, with the same parameters, hooks and modes."""
        made = cls.__new__(cls)
        made.__dict__.update(module.__dict__)
        made._qkv_same_embed_dim = False  # keeps nn.TransformerEncoderLayer off its fast path
        return made

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``nn.MultiheadAttention``."""
        batched = query.dim() == 3
        dim = 0 if self.batch_first else 1
        inputs = [one if batched else one.unsqueeze(dim) for one in (query, key, value)]
        query_BTE, key_BTE, value_BTE = (one if self.batch_first else one.transpose(0, 1) for one in inputs)
        mask = self._mask(attn_mask, key_padding_mask, query_BTE)
        query_BHTC, key_BHTC, value_BHTC = self._projected(query_BTE, key_BTE, value_BTE)
        mixed_BHTC, weights = self._attend(query_BHTC, key_BHTC, value_BHTC, mask, need_weights)
        output = self.out_proj(mixed_BHTC.transpose(1, 2).flatten(2))
        output = output if self.batch_first else output.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            output, weights = output.squeeze(dim), None if weights is None else weights.squeeze(0)
        return output, weights

    def _projected(self, query_BTE: Tensor, key_BTE: Tensor, value_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width, heads = self.num_heads * self.head_dim, (self.num_heads, self.head_dim)
        fused: Tensor | None = self._parameters["in_proj_weight"]
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        matrices = separate if fused is None else torch.split(fused, width)
        bias = self._parameters["in_proj_bias"]
        biases = (None, None, None) if bias is None else torch.split(bias, width)
        inputs = (query_BTE, key_BTE, value_BTE)
        query, key, value = (F.linear(*parts) for parts in zip(inputs, matrices, biases, strict=True))
        if self.bias_k is not None and self.bias_v is not None:
            key = torch.cat([key, self.bias_k.expand(len(key), -1, -1)], 1)
            value = torch.cat([value, self.bias_v.expand(len(value), -1, -1)], 1)
        if self.add_zero_attn:
            key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
        query, key, value = (one.view(*one.shape[:2], *heads).transpose(1, 2) for one in (query, key, value))
        return query, key, value

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, query_BTE: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores, of (batch, heads or 1, queries, keys)."""
        masks = []
        if attn_mask is not None:
            if attn_mask.dim() == 3:  # one for each head of the dense block
                attn_mask = attn_mask.reshape(len(query_BTE), -1, *attn_mask.shape[1:])
                if attn_mask.shape[1] not in (1, self.num_heads):
                    raise ValueError(
                        f"attn_mask: it is for {attn_mask.shape[1]} heads, and {self.num_heads} are left. Allowed: "
                        "a mask of (queries, keys)"
                    )
            masks.append(attn_mask)
        if padding is not None:
            masks.append(padding.reshape(len(query_BTE), 1, 1, -1))
        total: Tensor | None = None
        for mask in masks:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=query_BTE.dtype).masked_fill(mask, -math.inf)
            total = mask if total is None else total + mask
        added = int(self.bias_k is not None) + int(self.add_zero_attn)  # keys that every query sees
        return total if total is None or not added else F.pad(total, (0, added))

    def _attend(
        self, query_BHTC: Tensor, key_BHTC: Tensor, value_BHTC: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(query_BHTC, key_BHTC, value_BHTC, mask, dropout), None
        scores = query_BHTC @ key_BHTC.transpose(-2, -1) / math.sqrt(self.head_dim)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        if dropout:
            weights = F.dropout(weights, dropout)
        return weights @ value_BHTC, weights


def replacement_of(module: nn.Module) -> Any:
    """The class that takes a block's place once it has fewer heads; None where the block itself can work with them.

    Blocks are replaced whose code takes the width of all heads to be that of the inputs. A block of torchvision is only
    there once torchvision has been imported, so nothing imports it here.
    """
    if isinstance(module, nn.MultiheadAttention):
        return PrunedMultiheadAttention
    swin = sys.modules.get("torchvision.models.swin_transformer")
    if swin is None or not isinstance(module, swin.ShiftedWindowAttention):
        return None
    from pruningawaretraining.models.pruned_window_attention import PrunedWindowAttention

    return PrunedWindowAttention


def reads_fewer(module: nn.Module) -> bool:
    """Whether a block that has to be replaced for it reads other channels than its heads together are wide."""
    if replacement_of(module) is None:
        return False
    if isinstance(module, nn.MultiheadAttention):
        fused: Tensor | None = module._parameters["in_proj_weight"]
        weight, outputs = (module.q_proj_weight, 1) if fused is None else (fused, 3)
    else:
        weight, outputs = cast(nn.Linear, module.qkv).weight, 3
    return weight.shape[0] != outputs * weight.shape[1]


def shrink_heads(model: nn.Module, kept: Mapping[str, Kept], surgery: Surgery) -> None:
    """Adapt attention blocks to the kept heads, once their tensors have been sliced.

    Args:
        model: the model; blocks that cannot do with fewer heads are replaced, see :func:`replacement_of`.
        kept: block -> what is left of it.
        surgery: remembers the changes.
    """
    modules = dict(model.named_modules())
    for name, one in kept.items():
        module = with_fewer_heads(model, modules[name], surgery)
        for attribute in one.attributes:
            surgery.set_attribute(module, attribute, getattr(module, attribute) * one.heads // one.before)


def with_fewer_heads(model: nn.Module, module: nn.Module, surgery: Surgery) -> nn.Module:
    """The block itself if it can do with fewer heads, else what has been put in its place wherever the model has it."""
    kind = replacement_of(module)
    if kind is None or isinstance(module, kind):
        return module
    made: nn.Module = kind.of(module)
    for owner in list(model.modules()):
        if isinstance(owner, nn.TransformerEncoder) and any(one is module for one in owner.modules()):
            surgery.set_attribute(owner, "use_nested_tensor", False)  # only PyTorch's own block takes nested tensors
        for attribute, child in list(owner._modules.items()):
            if child is module:
                surgery.set_attribute(owner, attribute, made)
    return made
