"""The group lasso of rows in one compiled pass: what the map's formula says, and what PyTorch's operations give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruningawaretraining.groups import kernels as fused
from pruningawaretraining.proximal import PruneOptimizer

SHAPES = [(1, 6), (2, 3), (5, 4), (8, 16), (7, 3, 3, 3), (4, 1, 5, 5)]


def stepped(shape: tuple[int, ...], reg: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight after one step with learning rate 1, and its latent."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape) * torch.linspace(0.0, 2.0, shape[0]).view(-1, *[1] * (len(shape) - 1)))
    weight.grad = torch.zeros_like(weight)
    group = {"params": [weight], "group_type": "Dim0Grouper", "prox_type": "ProxGroupLasso", "reg_lambda": reg}
    optimizer = PruneOptimizer(torch.optim.SGD([group], lr=1.0))
    before = weight._version
    optimizer.step()
    assert weight._version > before
    return weight.detach(), optimizer.state[weight]["latent"]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("reg", [0.0, 0.3, 100.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_shrink_by_their_threshold(
    shape: tuple[int, ...], reg: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(fused, "kernels", lambda: None)
    elif not fused.available():
        pytest.skip("needs numba")
    weight, latent = stepped(shape, reg)
    rows = latent.flatten(1)
    norms = rows.norm(dim=1, keepdim=True)
    threshold = reg * rows.shape[1] ** 0.5
    expected = rows * ((norms - threshold).clamp(min=0) / norms.clamp(min=1e-30))
    assert torch.allclose(weight.flatten(1), expected, atol=1e-6)
    assert torch.equal(weight.flatten(1).norm(dim=1) == 0, norms.flatten() <= threshold)
