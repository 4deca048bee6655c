"""Models and data that the tests of second-order pruning share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class SmallNet(nn.Module):
    """Convolutions (one grouped), a norm, dropout, linear layers, none of them in round sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 10, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.conv2 = nn.Conv2d(10, 14, 3, groups=2, stride=2, bias=False)
        self.drop = nn.Dropout(0.5)
        self.hidden = nn.Linear(14, 15)
        self.head = nn.Linear(15, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        x = self.drop(torch.relu(self.conv2(x)).mean((2, 3)))
        return self.head(torch.relu(self.hidden(x)))


def small_net(seed: int = 0) -> SmallNet:
    torch.manual_seed(seed)
    return SmallNet()


def batches(count: int = 6, size: int = 8, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(0, 5, (size,), generator=generator))
        for _ in range(count)
    ]


cross_entropy = functional.cross_entropy


def layer_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1}


def zeros(model: nn.Module) -> int:
    return sum(int((weight == 0).sum()) for weight in layer_weights(model).values())


def total(model: nn.Module) -> int:
    return sum(weight.numel() for weight in layer_weights(model).values())


def rule(pattern: Any, criterion: Any, **others: Any) -> dict[str, Any]:
    return {"pattern": pattern, "criterion": criterion, "target": {"sparsity": 0.5}, **others}
