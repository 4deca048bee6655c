"""A network, data and a training loop for the tests of a GPU; on the CPU all of it is small."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import law_checks
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Pruning

RULE: dict[str, Any] = {
    "criterion": "magnitude",
    "regularizer": {"type": "growing_l2", "strength": 1e-3},
    "start": 1,
    "end": 5,
    "target": {"macs": 0.5},
}
EPOCHS = 7
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class SmallNet(nn.Module):
    """A residual block between two layers: compiled in seconds, and quick on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)
        self.up, self.inner = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.down = nn.Conv2d(64, 32, 3, padding=1)
        self.out = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.down(torch.relu(self.inner(self.up(x))))
        found: Tensor = self.out(torch.relu(x).mean((2, 3)))
        return found


def resnet(device: torch.device) -> nn.Module:
    """resnet18 on a GPU, half of its blocks on the CPU; both have weights of more than 262,144 values."""
    models = pytest.importorskip("torchvision").models.resnet
    blocks = [2, 2, 2, 2] if device.type == "cuda" else [1, 1, 1, 1]
    torch.manual_seed(0)
    model: nn.Module = models.ResNet(models.BasicBlock, blocks, num_classes=10).to(device)
    return model


def network(device: torch.device) -> nn.Module:
    """resnet18 on a GPU, the small one on the CPU."""
    torch.manual_seed(0)
    return resnet(device) if device.type == "cuda" else SmallNet().to(device)


def batch(device: torch.device, number: int = 0) -> tuple[Tensor, Tensor]:
    """Images and labels: 32 of 64 px on a GPU, 4 of 32 px on the CPU."""
    generator = torch.Generator().manual_seed(number)
    count, size = (32, 64) if device.type == "cuda" else (4, 32)
    images = torch.randn(count, 3, size, size, generator=generator)
    return images.to(device), torch.randint(10, (count,), generator=generator).to(device)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)


@dataclass
class Loop:
    """A user's loop, with every part that a GPU adds to it.

    Args:
        model: what is called: the model, or a wrapper of it.
        pruner, optimizer: as in any loop.
        amp: dtype of autocast; None for none.
        scaler: divides the gradients' scale out, and skips steps that overflowed.
        clip: largest norm of the gradients; None for none.
    """

    model: nn.Module
    pruner: Pruning
    optimizer: torch.optim.Optimizer
    amp: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    clip: float | None = None
    attempted: int = 0
    skipped: int = 0
    looked_at: int = 0

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext() if self.amp is None else torch.autocast(device.type, self.amp)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step of training; nothing in it waits for the device unless a scaler does."""
        self.optimizer.zero_grad()
        with self.autocast(images.device):
            loss = functional.cross_entropy(self.model(images).float(), labels)
        loss = loss + self.pruner.slice_regularize(self.model)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.clip is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.pruner.channel_regularize(self.model)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
        return loss

    def run(self, device: torch.device, epochs: int = EPOCHS, steps: int = 2) -> Loop:
        """Train; after every step masked channels are exactly 0."""
        for epoch in range(epochs):
            for number in range(steps):
                loss = self.step(*batch(device, number))
                self.attempted += 1
                if self.scaler is not None:
                    before = self.scaler.get_scale()
                    self.scaler.update()
                    self.skipped += self.scaler.get_scale() < before
                else:
                    assert bool(torch.isfinite(loss)), epoch
                self.looked_at += law_checks.check_masked_channels(self.pruner)
            self.pruner.prune(self.model, epoch)
        return self


def check_reached(pruner: Pruning, least: float = 0.49, most: float = 0.5) -> None:
    """The target of MACs is met from the right side, and closely."""
    assert pruner.phase == "finetune"
    assert least <= pruner.macs.fraction <= most


def check_state(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Every parameter is in the optimizer, and its state is shaped like it and lies on its device."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert known == {id(p) for p in model.parameters()}
    assert optimizer.state
    for parameter, state in optimizer.state.items():
        assert parameter.device.type == device.type
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                assert (value.shape, value.device) == (parameter.shape, parameter.device), name


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    """Where the weights of layers are exactly 0."""
    return {name: one.detach() == 0 for name, one in model.named_parameters() if one.dim() > 1}


def check_zeros_hold(model: nn.Module, zeros: dict[str, Tensor]) -> None:
    """What was 0 is 0, and the rest has values."""
    for name, parameter in model.named_parameters():
        if name in zeros:
            assert bool((parameter.detach()[zeros[name]] == 0).all()), name
            assert bool(parameter.detach()[~zeros[name]].any()), name


def zero_fraction(model: nn.Module, layers: Iterable[str] | None = None) -> float:
    """The share of zeros in the weights of layers (of all convolutions and linear layers by default)."""
    zeros = zeros_of(model)
    wanted = set(zeros if layers is None else layers)
    gone = sum(int(one.sum()) for name, one in zeros.items() if name in wanted)
    return gone / sum(one.numel() for name, one in zeros.items() if name in wanted)
