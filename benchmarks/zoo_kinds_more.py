"""More small networks of zoo_kinds.py: what computes its own filters, writes into slices, or is no image network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class StandardisedConv(nn.Conv2d):
    """Weight standardisation, written by hand: every filter has mean 0 and deviation 1 over its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class PartialConv(nn.Module):
    """FasterNet's block: a quarter of the channels is convolved and written back in place."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.part = width // 4
        self.mix = nn.Conv2d(self.part, self.part, 3, padding=1)
        self.wide, self.narrow = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        mixed = x.clone()
        mixed[:, : self.part] = self.mix(x[:, : self.part])
        return x + self.narrow(self.wide(mixed).relu())


class SpatialGate(nn.Module):
    """CBAM's attention over positions: mean and maximum over the channels, and a convolution of these two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.conv(pooled).sigmoid()


class StateSpace(nn.Module):
    """A selective state space block (Mamba): a gated depthwise convolution and a scan, over six steps."""

    def __init__(self, width: int = 16, inner: int = 32, states: int = 4) -> None:
        super().__init__()
        self.states = states
        self.embed, self.enter = nn.Linear(6, width), nn.Linear(width, 2 * inner)
        self.conv = nn.Conv1d(inner, inner, 3, padding=2, groups=inner)
        self.select, self.step = nn.Linear(inner, 2 * states + 1), nn.Linear(1, inner)
        self.decay, self.skip = nn.Parameter(torch.randn(inner, states)), nn.Parameter(torch.ones(inner))
        self.leave, self.head = nn.Linear(inner, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        value, gate = self.enter(x).chunk(2, -1)
        value = F.silu(self.conv(value.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        into, out, step = self.select(value).split([self.states, self.states, 1], -1)
        step = F.softplus(self.step(step))
        state, seen = x.new_zeros(len(x), value.shape[-1], self.states), []
        for time in range(x.shape[1]):
            kept = torch.exp(-step[:, time, :, None] * self.decay.exp()) * state
            state = kept + step[:, time, :, None] * into[:, time, None, :] * value[:, time, :, None]
            seen.append((state * out[:, time, None, :]).sum(-1))
        return self.head(x + self.leave((torch.stack(seen, 1) + value * self.skip) * F.silu(gate)))


class Splines(nn.Module):
    """A layer whose edges are functions (KAN), by radial bases and an einsum over inputs and bases."""

    def __init__(self, inputs: int, outputs: int, bases: int = 5) -> None:
        super().__init__()
        self.base, self.coefficients = nn.Linear(inputs, outputs), nn.Parameter(torch.randn(outputs, inputs, bases) / 5)
        self.register_buffer("grid", torch.linspace(-1, 1, bases))

    def forward(self, x: Tensor) -> Tensor:
        bases = torch.exp(-4 * (x[..., None] - self.grid) ** 2)
        return self.base(F.silu(x)) + torch.einsum("...ig,oig->...o", bases, self.coefficients)


def splines() -> nn.Module:
    return nn.Sequential(Splines(6, 24), Splines(24, 24), nn.Linear(24, 3))


class Messages(nn.Module):
    """A graph network: messages along edges are gathered by numbers and added up by numbers."""

    def __init__(self, width: int = 24, hidden: int = 32) -> None:
        super().__init__()
        self.register_buffer("source", torch.arange(12) % 5)
        self.register_buffer("target", (3 * torch.arange(12) + 1) % 5)
        self.embed, self.message = nn.Linear(6, width), nn.Linear(2 * width, hidden)
        self.update, self.head = nn.Linear(width + hidden, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).relu()
        sent = self.message(torch.cat([x[:, self.source], x[:, self.target]], -1)).relu()
        heard = torch.zeros_like(sent[:, : x.shape[1]]).index_add_(1, self.target, sent)
        return self.head(x + self.update(torch.cat([x, heard], -1)).relu())


class Spectral(nn.Module):
    """A Fourier layer: complex weights mix the channels of the lowest frequencies."""

    def __init__(self, width: int = 32, modes: int = 4) -> None:
        super().__init__()
        self.modes, self.mix = modes, nn.Conv2d(width, width, 1)
        self.weight = nn.Parameter(torch.randn(width, width, modes, modes, dtype=torch.complex64) / width)

    def forward(self, x: Tensor) -> Tensor:
        low, weight = (slice(None), slice(None), slice(self.modes), slice(self.modes)), self.weight
        waves = torch.fft.rfft2(x)
        mixed = waves.new_zeros(len(x), weight.shape[1], *waves.shape[2:])
        mixed[low] = torch.einsum("bixy,ioxy->boxy", waves[low], weight.to(waves.dtype))
        return torch.fft.irfft2(mixed, s=x.shape[-2:]) + self.mix(x)
