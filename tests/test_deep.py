"""A network of a thousand convolutions: how long it takes to find its channels, to mask and to remove them."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining import Pruning, count_macs

INPUTS = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


def residual(blocks: int) -> nn.Sequential:
    """Three stages of blocks, of 16, 32 and 64 channels."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1)]
    for width in (16, 32, 64):
        layers += [Block(width) for _ in range(blocks)]
        layers.append(nn.Conv2d(width, min(2 * width, 64), 3, stride=2, padding=1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@pytest.mark.slow
def test_a_thousand_convolutions_are_built_and_pruned_in_a_minute() -> None:
    torch.manual_seed(0)
    model = residual(166)
    assert sum(isinstance(one, nn.Conv2d) for one in model.modules()) == 1000
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    config = {"rules": [{"target": {"macs": 0.5}, "start": 0, "end": 2, "final_sparsity": 0.6}]}
    begun = time.process_time()
    pruner = Pruning(model, config, example_inputs=INPUTS, optimizer=optimizer)
    done = [pruner.prune(model, epoch) for epoch in range(3)]
    spent = time.process_time() - begun
    assert "removed" in done and pruner.macs.kept == count_macs(model, INPUTS) <= 0.5 * pruner.macs.dense
    assert spent < 60
