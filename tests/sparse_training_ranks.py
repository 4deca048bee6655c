"""Run by test_sparse_training.py under torch.distributed.run: the example on every rank, and what came out."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


class PlainNet(nn.Module):
    """No norm, whose statistics would be those of each rank's part of a batch."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 3, stride=2)
        self.linear = nn.Linear(108, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.conv2(torch.relu(self.conv1(x)))).flatten(1))


def main() -> None:
    import sparse_training

    folder = Path(sys.argv[1])
    found = sparse_training.main(["--model", "sparse_training_ranks:PlainNet", "--out", str(folder), *sys.argv[2:]])
    torch.save({key: found[key] for key in ("masks", "model")}, folder / f"rank{os.environ.get('RANK', 'alone')}.pt")


if __name__ == "__main__":
    main()
