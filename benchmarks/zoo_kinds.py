"""Small networks, one of each kind that other tools leave dense or break: what has to be followed exactly.

Each is a convolution or linear stem, the operation in question, and a head; ``build_kind(name)`` gives the network and
an input. Widths are computed from tensors, or are attributes of modules, as in the networks that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_kinds_more import Messages, PartialConv, SpatialGate, Spectral, StandardisedConv, StateSpace, splines


def conv(inputs: int, outputs: int, kernel: int = 3, **options: int | bool) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)  # type: ignore[arg-type]


class Between(nn.Module):
    """A stem, something in between, and a head of convolutions."""

    def __init__(self, between: nn.Module, width: int = 32, out: int = 32) -> None:
        super().__init__()
        self.stem, self.between = conv(3, width), between
        self.after, self.head = conv(out, 32), conv(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.between(self.stem(x))).relu())


class C2f(nn.Module):
    """YOLOv8's block: a chunk, a chain of bottlenecks, a concatenation of everything."""

    def __init__(self, inputs: int = 32, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.enter, self.leave = conv(inputs, 2 * width, 1), conv((2 + depth) * width, inputs, 1)
        self.chain = nn.ModuleList(
            nn.Sequential(conv(width, width), nn.SiLU(), conv(width, width)) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for one in self.chain:
            parts.append(parts[-1] + one(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class Res2Net(nn.Module):
    """Pieces of a width that is an attribute, each added to the one before."""

    def __init__(self, inputs: int = 32, width: int = 8, scale: int = 4) -> None:
        super().__init__()
        self.width = width
        self.enter, self.leave = conv(inputs, width * scale, 1), conv(width * scale, inputs, 1)
        self.convs = nn.ModuleList(conv(width, width) for _ in range(scale - 1))

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(self.enter(x), self.width, 1)
        done = [pieces[0]]
        for number, one in enumerate(self.convs):
            piece = pieces[number + 1]
            done.append(one(piece if number == 0 else piece + done[-1]).relu())
        return x + self.leave(torch.cat(done, 1))


class Elan(nn.Module):
    """YOLOv7's block: half of a split goes through a chain of which every stage is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.a, self.b, self.leave = conv(32, 32, 1), conv(16, 16), conv(16, 16), conv(64, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        left, right = x.split(x.shape[1] // 2, 1)
        first = self.a(right).relu()
        return self.leave(torch.cat([left, right, first, self.b(first).relu()], 1))


class PackedAttention(nn.Module):
    """A transformer block with packed projections, and a packed gated MLP behind it."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        parts = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts.unbind(0)).transpose(1, 2).reshape(batch, tokens, -1)
        x = x + self.proj(mixed)
        gate, value = self.fc1(self.norm2(x)).chunk(2, -1)
        return x + self.fc2(F.silu(gate) * value)


class PackedGates(nn.Module):
    """Two such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.blocks = nn.Sequential(PackedAttention(), PackedAttention())
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)).mean(1))


class Blur(nn.Module):
    """A depthwise blur whose kernel is a buffer, a mean that is subtracted, and a scale."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.rand(width, 1, 3, 3))
        self.register_buffer("mean", torch.rand(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x - self.mean, self.kernel, padding=1, groups=x.shape[1])


class ChannelNorm(nn.Module):
    """A layer norm over the channels of an image, written by hand."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return self.weight[:, None, None] * (x - mean) / torch.sqrt(variance + 1e-6) + self.bias[:, None, None]


class Scaler(nn.Module):
    """A root-mean-square norm that no name tells."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.gain


class PixelNorm(nn.Module):
    """Without any parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(1, keepdim=True) + 1e-8).sqrt()


class InCode(nn.Module):
    """A block whose own code has the norm over the channels of its layer."""

    def __init__(self, norm: Callable[[Tensor], Tensor], width: int = 32) -> None:
        super().__init__()
        self.norm, self.first, self.second = norm, conv(width, width), conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.norm(self.first(x)).relu())


def _standard(x: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-6).sqrt()


def _pixel(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(1, keepdim=True) + 1e-8).sqrt()


def _root_mean_square(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)


class ResponseNorm(nn.Module):
    """ConvNeXt V2's global response norm."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.zeros(1, width, 1, 1)), nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=(2, 3), keepdim=True)
        return x + self.gamma * (x * size / (size.mean(1, keepdim=True) + 1e-6)) + self.beta


class FunctionalNorm(nn.Module):
    """``F.layer_norm`` over a width that is an attribute, channels last."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.dim = width
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), (self.dim,), self.weight, self.bias)
        return x.permute(0, 3, 1, 2)


class FunctionalGroupNorm(nn.Module):
    """``F.group_norm`` with parameters of its own."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 4, self.weight, self.bias)


class Selective(nn.Module):
    """Two branches weighed by a softmax over them."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.small, self.large = conv(width, width), conv(width, width, 5)
        self.squeeze, self.select = conv(width, 16, 1), conv(16, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.small(x), self.large(x)], 1)
        weights = self.select(self.squeeze(both.sum(1).mean((2, 3), keepdim=True)).relu())
        weights = weights.view(len(x), 2, -1, 1, 1).softmax(1)
        return (both * weights).sum(1)


class NonLocal(nn.Module):
    """Attention over positions by batched products, without heads."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.theta, self.phi, self.g = (conv(width, 16, 1) for _ in range(3))
        self.out = conv(16, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, value = (one(x).flatten(2) for one in (self.theta, self.phi, self.g))
        weights = torch.bmm(theta.transpose(1, 2), phi).softmax(-1)
        mixed = torch.bmm(weights, value.transpose(1, 2)).transpose(1, 2)
        return x + self.out(mixed.reshape(len(x), -1, *x.shape[2:]))


class Shuffle(nn.Module):
    """A channel shuffle by view and transpose, and a grouped convolution behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = conv(32, 32, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)
        return self.grouped(x)


class Experts(nn.Module):
    """A mixture of experts whose weights lie in one tensor, by einsum."""

    def __init__(self, width: int = 32, hidden: int = 64, experts: int = 4) -> None:
        super().__init__()
        self.embed, self.router, self.head = nn.Linear(6, width), nn.Linear(width, experts), nn.Linear(width, 4)
        self.first = nn.Parameter(torch.randn(experts, width, hidden) / 6)
        self.second = nn.Parameter(torch.randn(experts, hidden, width) / 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        share = self.router(x).softmax(-1)
        hidden = torch.einsum("bti,eih->bteh", x, self.first).relu()
        return self.head(x + torch.einsum("bteh,eho,bte->bto", hidden, self.second, share))


class GatedExperts(Experts):
    """The same with gates."""

    def __init__(self, width: int = 32, hidden: int = 64, experts: int = 4) -> None:
        super().__init__(width, hidden, experts)
        self.gate = nn.Parameter(torch.randn(experts, width, hidden) / 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        share = self.router(x).softmax(-1)
        hidden = torch.einsum("bti,eih->bteh", x, self.first) * F.silu(torch.einsum("bti,eih->bteh", x, self.gate))
        return self.head(x + torch.einsum("bteh,eho,bte->bto", hidden, self.second, share))


class ConvGru(nn.Module):
    """A convolutional recurrent cell, over four steps."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.gates, self.new = conv(3, width), conv(2 * width, 2 * width), conv(2 * width, width)
        self.head = conv(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        frames = [self.stem(one) for one in x.unbind(1)]
        state = torch.zeros_like(frames[0])
        for frame in frames:
            update, reset = self.gates(torch.cat([frame, state], 1)).sigmoid().chunk(2, 1)
            new = self.new(torch.cat([frame, reset * state], 1)).tanh()
            state = (1 - update) * state + update * new
        return self.head(state)


class ConvLstm(nn.Module):
    """A convolutional LSTM cell, whose width is an attribute, over four steps."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.hidden = width
        self.stem, self.gates, self.head = conv(3, width), conv(2 * width, 4 * width), conv(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, _, height, width = x.shape
        state = memory = x.new_zeros(batch, self.hidden, height, width)
        for frame in x.unbind(1):
            parts = self.gates(torch.cat([self.stem(frame).relu(), state], 1))
            enter, keep, out, new = torch.split(parts, self.hidden, 1)
            memory = keep.sigmoid() * memory + enter.sigmoid() * new.tanh()
            state = out.sigmoid() * memory.tanh()
        return self.head(state)


class Recurrent(nn.Module):
    """``nn.LSTM`` or ``nn.GRU`` between linear layers."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.before, self.rnn = nn.Linear(6, 32), kind(32, 32, num_layers=2, batch_first=True)
        self.after, self.head = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.rnn(self.before(x))[0]).relu())


class Glu(nn.Module):
    """``F.glu`` over channels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(x, 1)


IMAGES, TOKENS, FRAMES = (2, 3, 12, 12), (2, 5, 6), (2, 4, 3, 8, 8)
Kind = tuple[Callable[[], nn.Module], tuple[int, ...], float]
"""How to build it, the shape of its input, and the smallest fraction of its MACs that it has to reach."""


def _frozen() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10, norm_layer=torchvision.ops.FrozenBatchNorm2d)


KINDS: dict[str, Kind] = {
    "C2f (YOLOv8)": (lambda: Between(C2f()), IMAGES, 0.05),
    "Res2Net": (lambda: Between(Res2Net()), IMAGES, 0.05),
    "ELAN (YOLOv7)": (lambda: Between(Elan()), IMAGES, 0.05),
    "packed qkv beside a packed gated MLP": (PackedGates, TOKENS, 0.35),
    "resnet18 with FrozenBatchNorm2d": (_frozen, (1, 3, 64, 64), 0.01),
    "blur kernel and mean as buffers": (lambda: Between(Blur()), IMAGES, 0.02),
    "layer norm over channels by hand": (lambda: Between(ChannelNorm()), IMAGES, 0.02),
    "RMS norm by hand": (lambda: Between(Scaler()), IMAGES, 0.02),
    "pixel norm": (lambda: Between(PixelNorm()), IMAGES, 0.02),
    "mean and variance in a block's code": (lambda: Between(InCode(_standard)), IMAGES, 0.05),
    "RMS norm in a block's code": (lambda: Between(InCode(_root_mean_square)), IMAGES, 0.05),
    "pixel norm in a block's code": (lambda: Between(InCode(_pixel)), IMAGES, 0.05),
    "global response norm": (lambda: Between(ResponseNorm()), IMAGES, 0.02),
    "F.layer_norm": (lambda: Between(FunctionalNorm()), IMAGES, 0.02),
    "F.group_norm": (lambda: Between(FunctionalGroupNorm()), IMAGES, 0.05),
    "selective kernels": (lambda: Between(Selective()), IMAGES, 0.05),
    "non-local block": (lambda: Between(NonLocal()), IMAGES, 0.05),
    "F.glu": (lambda: Between(Glu(), 32, 16), IMAGES, 0.05),
    "pixel shuffle": (lambda: Between(nn.PixelShuffle(2), 32, 8), IMAGES, 0.05),
    "channel shuffle by view": (lambda: Between(Shuffle()), IMAGES, 0.05),
    "mixture of experts by einsum": (Experts, TOKENS, 0.1),
    "mixture of gated experts by einsum": (GatedExperts, TOKENS, 0.1),
    "ConvGRU": (ConvGru, FRAMES, 0.05),
    "ConvLSTM": (ConvLstm, FRAMES, 0.05),
    "nn.LSTM": (partial(Recurrent, nn.LSTM), TOKENS, 0.1),
    "nn.GRU": (partial(Recurrent, nn.GRU), TOKENS, 0.1),
    "weight standardisation by hand": (lambda: Between(StandardisedConv(32, 32, 3, padding=1)), IMAGES, 0.02),
    "partial convolution, written into a slice": (lambda: Between(PartialConv()), IMAGES, 0.05),
    "state space (Mamba)": (StateSpace, TOKENS, 0.05),
    "functions on edges (KAN)": (splines, TOKENS, 0.05),
    "messages on a graph": (Messages, TOKENS, 0.05),
    "attention over positions (CBAM)": (lambda: Between(SpatialGate()), IMAGES, 0.05),
    "Fourier layer": (lambda: Between(Spectral()), IMAGES, 0.05),
}


def build_kind(name: str) -> tuple[nn.Module, Tensor]:
    """A network of a kind, in eval mode, and an input."""
    torch.manual_seed(0)
    build, shape, _ = KINDS[name]
    return build().eval(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
