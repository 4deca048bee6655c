"""The compiled search for the lowest of every window finds what PyTorch's operations find."""

from __future__ import annotations

import pytest
import torch

from pruningawaretraining.allocation.windows import _lowest_in_rows
from pruningawaretraining.groups import kernels as fused


@pytest.mark.skipif(not fused.available(), reason="needs numba")
@pytest.mark.parametrize(("number", "of"), [(1, 2), (2, 4), (3, 8), (9, 16), (16, 32)])
def test_the_compiled_search_agrees(number: int, of: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(20, 30, of, generator=torch.Generator().manual_seed(of)).round(decimals=1)  # many ties
    values[0, :, 1] = -torch.inf
    values[1, :, 0] = torch.inf
    compiled = _lowest_in_rows(values, number)
    monkeypatch.setattr(fused, "kernels", lambda: None)
    assert torch.equal(compiled, _lowest_in_rows(values, number))
    assert torch.equal(compiled.sum(-1), torch.full((20, 30), number))
