"""Every registered grouper with every registered proximal map that goes with it, and what the tests count in a step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pruningawaretraining.errors import ConfigError
from pruningawaretraining.proximal import CoupledChannelGrouper
from pruningawaretraining.proximal.options import read_options
from pruningawaretraining.registry import lookup, names

FIELDS = {"k": 4, "num_heads": 4, "npack": 1, "min_sparsity": 0.4, "n_nonzero": 2, "reg_lambda": 0.1}
SHAPES = [
    (16, 12, 3, 3),
    (8, 12, 3, 3),
    (16, 12, 3, 3),
    (16, 8),
    (8, 12),
    (16, 12, 1, 1),
    (8, 12, 3, 3),
    (16, 8),
    (12, 6, 1, 1),
]
INPUTS = torch.zeros(1, 3, 8, 8)


class Residual(nn.Module):
    """Two blocks on one stream: channels that several layers make."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1))
            for _ in range(2)
        )
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def coupled_grouper(**options: Any) -> CoupledChannelGrouper:
    torch.manual_seed(0)
    return CoupledChannelGrouper(Residual(), INPUTS, **options)


def fields(grouper: str) -> dict[str, Any]:
    """Options of a group; groups of one element have no second one to keep."""
    return {**FIELDS, **({"n_nonzero": 1} if grouper in ("ElemGrouper", "ConvFilterGrouper") else {})}


def fit(grouper: str, prox: str) -> bool:
    """Whether the two go together."""
    entry: Any = coupled_grouper() if issubclass(lookup("grouper", grouper), CoupledChannelGrouper) else grouper
    try:
        read_options({"group_type": entry, "prox_type": prox, **fields(grouper)}, "here", False)
    except ConfigError as error:
        assert "does not go with" in str(error) or "does not act on whole" in str(error), error
        return False
    return True


PAIRS = [(grouper, prox) for grouper in names("grouper") for prox in names("prox") if fit(grouper, prox)]


def shapes_for(grouper: str) -> list[tuple[int, ...]]:
    """The shapes that a grouper can group."""
    options = {"group_type": grouper, **fields(grouper)}
    prox = next(prox for one, prox in PAIRS if one == grouper)
    built: Any = read_options({**options, "prox_type": prox}, "here", False).grouper
    found = []
    for shape in SHAPES:
        try:
            built.check(shape, "weight")
        except ConfigError:
            continue
        found.append(shape)
    return found


class Operations(TorchDispatchMode):
    """Counts the operations that a device would be sent: no views, no allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.found.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and not func.is_view and not func.__name__.startswith("empty"):
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))
