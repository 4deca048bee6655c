"""Masked weights that are not 0: counted, and set to 0 again.

Shape suffixes: ``_W`` any weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pruningawaretraining.distributed.fsdp import local_of


@torch.no_grad()
def restored(factors: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> dict[int, int]:
    """Set masked weights to 0, whatever they hold; return id of each parameter -> how many were not, where any was.

    Args:
        factors: gives parameters, each with what broadcasts to it: 0 where it is masked.
    """
    counts = [_strays(parameter, keep_W) for parameter, keep_W in factors()]
    if not counts:
        return {}
    strays = torch.stack([one.to(counts[0].device) for one in counts]).cpu().tolist()  # the host waits once
    found: dict[int, int] = {}
    for (parameter, keep_W), count in zip(factors(), strays, strict=True) if any(strays) else ():
        if count:
            weight_W = local_of(parameter.detach())
            weight_W.masked_fill_((keep_W == 0).to(weight_W.device), 0.0)
            found[id(parameter)] = found.get(id(parameter), 0) + int(count)
    return found


def _strays(parameter: Tensor, keep_W: Tensor) -> Tensor:
    """How many masked weights are not 0."""
    weight_W = local_of(parameter.detach())
    return (weight_W != 0).gt(keep_W.bool().to(weight_W.device)).count_nonzero()
