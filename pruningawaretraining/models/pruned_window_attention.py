"""torchvision's shifted window attention with fewer heads than its code expects.

Shape suffixes: ``_B`` batch, ``_Y`` rows, ``_X`` columns, ``_V`` rows and ``_U`` columns of windows, ``_T`` positions
of a window, ``_C`` channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.swin_transformer import ShiftedWindowAttention


class PrunedWindowAttention(ShiftedWindowAttention):  # type: ignore[misc]
    """torchvision's shifted window attention (both versions of Swin) with fewer heads."""

    @classmethod
    def of(cls, module: Any) -> PrunedWindowAttention:
        """The same block, with the same parameters, hooks and modes."""
        made = cls.__new__(cls)
        made.__dict__.update(module.__dict__)
        made.bias_of = type(module).get_relative_position_bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Attention within windows of an image of (batch, rows, columns, channels)."""
        rows, columns = x.shape[1:3]
        high, wide = self.window_size
        x_BYXC = F.pad(x, (0, 0, 0, -columns % wide, 0, -rows % high))
        size = x_BYXC.shape[1:3]
        shift = [
            0 if window >= length else by
            for window, length, by in zip((high, wide), size, self.shift_size, strict=True)
        ]
        x_BYXC = x_BYXC.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else x_BYXC
        x_BVUTC = _into_windows(x_BYXC, high, wide)
        mixed = self._attend(x_BVUTC, self._mask(size, shift, x))
        mixed = F.dropout(self.proj(mixed), self.dropout, self.training)
        mixed = mixed.reshape(*mixed.shape[:3], high, wide, -1).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        mixed = mixed.roll((shift[0], shift[1]), (1, 2)) if any(shift) else mixed
        out: Tensor = mixed[:, :rows, :columns].contiguous()
        return out

    def _attend(self, x_BVUTC: Tensor, mask: Tensor) -> Tensor:
        bias, logit_scale = self.qkv.bias, getattr(self, "logit_scale", None)
        if logit_scale is not None and bias is not None:  # keys of the second version have none
            width = len(bias) // 3
            bias = torch.cat([bias[:width], torch.zeros_like(bias[:width]), bias[2 * width :]])
        qkv = F.linear(x_BVUTC, self.qkv.weight, bias)
        qkv = qkv.reshape(*qkv.shape[:-1], 3, self.num_heads, -1)
        query, key, value = (one.transpose(-2, -3) for one in qkv.unbind(-3))
        scale = None
        if logit_scale is not None:
            query = F.normalize(query, dim=-1) * logit_scale.clamp(max=math.log(100.0)).exp()
            key, scale = F.normalize(key, dim=-1), 1.0
        dropped = self.attention_dropout if self.training else 0.0
        return (
            F.scaled_dot_product_attention(query, key, value, mask, dropped, scale=scale).transpose(-2, -3).flatten(-2)
        )

    def _mask(self, size: Sequence[int], shift: Sequence[int], like: Tensor) -> Tensor:
        """Bias added to the scores of every window: the position bias, and -100 between parts that the shift put
        side by side."""
        bias: Tensor = self.bias_of(self)
        if not any(shift):
            return bias[:, None].transpose(0, 1)
        parts = [
            (torch.arange(length, device=like.device) >= length - window).long()
            + (torch.arange(length, device=like.device) >= length - by).long()
            for length, window, by in zip(size, self.window_size, shift, strict=True)
        ]
        high, wide = self.window_size
        part_VUT = _into_windows((3 * parts[0][:, None] + parts[1])[None, ..., None], high, wide)[0, ..., 0]
        apart = part_VUT[..., None] != part_VUT[..., None, :]
        mask: Tensor = bias[0] + apart[:, :, None].to(like.dtype) * -100.0
        return mask


def _into_windows(x_BYXC: Tensor, high: int, wide: int) -> Tensor:
    """Images as windows of positions: (batch, rows and columns of windows, positions, channels)."""
    batch, rows, columns, channels = x_BYXC.shape
    windows = x_BYXC.reshape(batch, rows // high, high, columns // wide, wide, channels)
    return windows.transpose(2, 3).flatten(3, 4)
