"""The proximal step on the GPU: captured in a CUDA graph its threshold goes on growing, and pools change no result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from proximal_cases import PAIRS, fields, shapes_for
from torch import Tensor, nn

from pruningawaretraining.proximal import PruneOptimizer
from pruningawaretraining.proximal.options import read_options
from pruningawaretraining.proximal.prox_groups import Unit

LR, REG = 0.01, 0.5
GROUPS: dict[str, dict[str, Any]] = {
    "rows": {"group_type": "Dim0Grouper", "prox_type": "ProxGroupLasso"},
    "elements": {"group_type": "ElemGrouper", "prox_type": "ProxLasso"},
}


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph; three steps are taken before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def image_of(latent: Tensor, name: str, threshold: float) -> Tensor:
    """The map's formula."""
    if name == "elements":
        return torch.nn.functional.softshrink(latent, threshold)
    rows = latent.flatten(1)
    norms = rows.norm(dim=1, keepdim=True)
    return (rows * (1 - threshold * rows.shape[1] ** 0.5 / norms).clamp(min=0)).view_as(latent)


@pytest.mark.parametrize("name", GROUPS)
def test_a_captured_step_goes_on_from_the_last_one(cuda: torch.device, name: str) -> None:
    """With gradients of 0 the latents stay, and only the threshold moves the weights."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, device=cuda)) for shape in [(16, 8), (16, 8), (8, 4, 3, 3)]]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    lr = torch.tensor(LR, device=cuda)
    group = {"params": weights, "reg_lambda": REG, **GROUPS[name]}
    optimizer = PruneOptimizer(torch.optim.Adam([group], lr=lr, capturable=True))
    replay = captured(lambda: optimizer.step())
    for replays in range(1, 5):
        replay()
        for weight in weights:
            expected = image_of(optimizer.state[weight]["latent"], name, REG * LR * (3 + replays))
            torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize(("grouper", "prox"), [pair for pair in PAIRS if pair[0] != "CoupledChannelGrouper"])
def test_weights_together_are_as_one_by_one(device: torch.device, grouper: str, prox: str) -> None:
    torch.manual_seed(0)
    latents = [torch.randn(shape, device=device) for shape in shapes_for(grouper)]
    found = []
    for pool in (True, False):
        weights: list[Tensor] = [torch.empty_like(one) for one in latents]
        group = {"params": weights, "group_type": grouper, "prox_type": prox, **fields(grouper)}
        unit = Unit([0], read_options(group, "here", False), pool)
        unit.plan(unit.places([group]), latents).run(0.1, unit.options.prox.target)
        found.append(weights)
    for together, alone in zip(*found, strict=True):
        torch.testing.assert_close(together, alone)
