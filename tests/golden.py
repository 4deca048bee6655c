"""What every pattern, criterion and scope decides on a small fixed network: the rows of data/golden_masks.json.

    python tests/golden.py            # write the table anew, after a change of decisions that was meant

A row is the masks after the first and after the last of three events, in short for each set or weight, or the kind of
error that refuses the combination.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from moe import MoeNet
from torch import Tensor, nn
from torch.nn import functional as F

from pruningawaretraining import Pruning
from pruningawaretraining.errors import PruningError
from pruningawaretraining.registry import names

TABLE = Path(__file__).parent / "data" / "golden_masks.json"
PATTERNS: dict[str, Any] = {
    "channel": {"type": "channel"},
    "head": {"type": "head"},
    "expert": "expert",
    "depth": {"type": "depth"},
    "slice": {"type": "slice", "block_size": 4},
    "block": "4x1",
    "n_of_m": "2:4",
    "unstructured": "unstructured",
}
EVENTS = 3


class Attention(nn.Module):
    """Multi-head attention with its projections fused, as in vision transformers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        batch, tokens, _ = x_BTC.shape
        qkv = self.qkv(x_BTC).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


class Net(nn.Module):
    """Convolutions, residual blocks and an attention block: something for every pattern."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(*[Block(16) for _ in range(3)])
        self.widen = nn.Conv2d(16, 32, 1)
        self.attention, self.layer_norm = Attention(32, 4), nn.LayerNorm(32)
        self.hidden, self.head = nn.Linear(32, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.widen(self.blocks(torch.relu(self.norm(self.stem(x)))))
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(self.layer_norm(tokens))
        return self.head(torch.relu(self.hidden(tokens.mean(1))))


class Images(MoeNet):
    """Blocks of experts behind the pixels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(2).transpose(1, 2)).mean(1)


def net_of(pattern: Any) -> nn.Module:
    """What a pattern is tried on."""
    return Images(4, 4) if pattern == "expert" else Net()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 16, 4, 5, 5, generator=generator)
    return [(one, torch.arange(16) % 4) for one in images]


def packed(keep: Tensor) -> str:
    """A mask in short: groups that are kept, all groups, and a hash of which."""
    return shortened("".join("1" if bool(one) else "0" for one in keep))


def shortened(bits: str) -> str:
    """The same of a text of ones and zeros, the first group first."""
    return f"{bits.count('1')}/{len(bits)} {hashlib.sha256(bits.encode()).hexdigest()[:12]}"


def masks_of(pruner: Pruning) -> dict[str, str]:
    return {name: packed(keep.cpu().flatten()) for name, keep in sorted(pruner.masks.items())}


def decisions(pattern: Any, criterion: Any, scope: str) -> dict[str, dict[str, str]] | str:
    """Masks after the first and the last event of a short training, or the kind of error that refuses the pruner."""
    torch.manual_seed(0)
    model, data = net_of(pattern), batches(EVENTS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    try:
        pruner = pruner_of(model, pattern, criterion, scope, optimizer)
    except PruningError as error:
        return type(error).__name__
    pruner.calibrate_with(data[:2], F.cross_entropy)
    found = {}
    for epoch, (images, labels) in enumerate(data):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        pruner.prune(model, epoch)
        if epoch in (0, EVENTS - 1):
            found["first" if epoch == 0 else "last"] = masks_of(pruner)
    pruner.on_train_end()
    return found


def pruner_of(model: nn.Module, pattern: Any, criterion: Any, scope: str = "global", optimizer: Any = None) -> Pruning:
    """A pruner with one rule; what does not go together is refused here."""
    rule = {"pattern": pattern, "criterion": criterion, "scope": scope, "schedule": "linear", "start": 0}
    rule |= {"end": EVENTS - 1, "target": {"sparsity": 0.5}}
    return Pruning(model, {"rules": [rule]}, example_inputs=batches(1)[0][0][:1], optimizer=optimizer)


SCOPED = ("magnitude", "taylor")
"""Criteria that are tried with every scope; a scope sees nothing but scores."""


def combinations() -> list[tuple[str, str, str]]:
    """Every registered pattern with every registered criterion, and with every scope for some."""
    every = itertools.product(names("pattern"), names("criterion"), names("scope"))
    return [one for one in every if one[2] == "global" or one[1] in SCOPED]


def row(pattern: str, criterion: str, scope: str) -> dict[str, dict[str, str]] | str:
    return decisions(PATTERNS[pattern], criterion, scope)


def main() -> None:
    torch.set_num_threads(1)
    table = {" ".join(one): row(*one) for one in combinations()}
    lines = (f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in table.items())
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
