"""Models for runs under torchrun: without a norm, whose statistics would be those of each process's share."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch import Tensor, nn


class PlainNet(nn.Module):
    """Two convolutions and a linear layer; with DIE_AT its process kills itself in that training pass (rank 1 only)."""

    def __init__(self, num_classes: int = 10, **_: Any) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 3, stride=2)
        self.linear = nn.Linear(108, num_classes)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.passes += 1
            if os.environ.get("RANK") == "1" and str(self.passes) == os.environ.get("DIE_AT"):
                os.kill(os.getpid(), signal.SIGKILL)
        return self.linear(torch.relu(self.conv2(torch.relu(self.conv1(x)))).flatten(1))
