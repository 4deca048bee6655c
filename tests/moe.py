"""Blocks of experts as transformers 5 writes them, small, and with no operation that waits for the device.

Shape suffixes: ``_E`` experts, ``_T`` tokens, ``_K`` experts of a token, ``_H`` features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

EXPERTS, TOP_K, WIDTH = 8, 2, 6


class Router(nn.Module):
    """Softmax over all experts, then the largest, which share the weight among them."""

    def __init__(self, width: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k, self.num_experts = top_k, experts
        self.weight = nn.Parameter(torch.randn(experts, width))
        self.bias = nn.Parameter(torch.randn(experts) / 4)

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = functional.linear(x_TH, self.weight, self.bias)
        largest_TK, index_TK = torch.topk(logits_TE.softmax(-1), self.top_k, dim=-1)
        return logits_TE, largest_TK / largest_TK.sum(-1, keepdim=True), index_TK


class Experts(nn.Module):
    """Gated layers, the weights of all experts stacked."""

    def __init__(self, width: int, inner: int, experts: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, width) / width**0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, width, inner) / inner**0.5)

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        gate, up = torch.einsum("th,tkih->tki", x_TH, self.gate_up_proj[index_TK]).chunk(2, dim=-1)
        out_TKH = torch.einsum("tki,tkhi->tkh", functional.silu(gate) * up, self.down_proj[index_TK])
        return (out_TKH * weight_TK[..., None]).sum(1)


class MoeBlock(nn.Module):
    def __init__(self, width: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.gate, self.experts = Router(width, experts, top_k), Experts(width, 5, experts)

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, x.shape[-1])
        _, weight_TK, index_TK = self.gate(x_TH)
        return self.experts(x_TH, index_TK, weight_TK).reshape(x.shape)


class LooseBlock(nn.Module):
    """The router is a linear layer, and the block does the rest."""

    def __init__(self, width: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k, self.num_local_experts = top_k, experts
        self.router, self.experts = nn.Linear(width, experts), Experts(width, 5, experts)

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, x.shape[-1])
        weight_TK, index_TK = torch.topk(self.router(x_TH).softmax(-1), self.top_k, dim=-1)
        return self.experts(x_TH, index_TK, weight_TK).reshape(x.shape)


class MoeNet(nn.Module):
    """Residual blocks of experts between two linear layers."""

    def __init__(self, inputs: int = 4, outputs: int = 3, kind: type[nn.Module] = MoeBlock, experts: int = EXPERTS):
        super().__init__()
        self.num_experts = experts
        self.embed, self.head = nn.Linear(inputs, WIDTH), nn.Linear(WIDTH, outputs)
        self.blocks = nn.ModuleList(kind(WIDTH, experts, TOP_K) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def built(kind: type[nn.Module] = MoeBlock, experts: int = EXPERTS) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return MoeNet(kind=kind, experts=experts), torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
