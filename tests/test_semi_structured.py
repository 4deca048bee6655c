"""2:4 layers for GPUs: what is refused where, the check of the masks, and zeros that an exported file keeps."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from pruningawaretraining import Pruning, export_onnx, to_semi_structured
from pruningawaretraining.errors import ModelError
from pruningawaretraining.semi_structured import is_two_of_four

CUDA = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 0, 2, 0, 0, 0, 3, 4]], True),
        ([[0, 0, 0, 0, 0, 0, 0, 1]], True),
        ([[1, 2, 3, 0, 0, 0, 0, 0]], False),
        ([[0, 1, 2, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 1, 1]], False),
        ([[1, 0, 2]], False),
    ],
)
def test_the_check(rows: list[list[float]], expected: bool) -> None:
    assert is_two_of_four(torch.tensor(rows, dtype=torch.float32)) is expected


def net(pattern: Any = "2:4") -> tuple[nn.Sequential, Pruning]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    rule = {"pattern": pattern, "layers": ["0", "2"], "target": {"sparsity": 0.5}}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=torch.randn(2, 64))
    pruner.prune(epoch=0)
    return model, pruner


@pytest.mark.parametrize(
    ("change", "layers", "message"),
    [
        (lambda model: model.half(), ["0"], r"0.weight: it is on 'cpu', which has no semi-structured sparse products"),
        (lambda model: model.half(), None, "Allowed: a CUDA device of capability 8.0 or above"),
        (lambda model: model, ["0"], r"0.weight: its type is torch.float32. Allowed: torch.float16, torch.bfloat16"),
        (lambda model: model, None, "no linear layer can become semi-structured. 0: its type is"),
        (lambda model: model.half(), ["4"], r"4.weight: its shape \(10, 64\) does not fit"),
        (lambda model: model.half(), ["0", "zero"], "layers: 'zero' is not known"),
        (lambda model: model.half(), ["1"], "layers: '1' is not known"),
        (lambda model: nn.ReLU(), None, "there is no nn.Linear"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(change: Any, layers: list[str] | None, message: str) -> None:
    model = change(net()[0])
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(ModelError, match=message):
        to_semi_structured(model, layers)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_a_weight_that_is_not_2_4_is_named() -> None:
    model, _ = net("unstructured")
    with pytest.raises(ModelError, match="2.weight: it is not 2:4"):
        to_semi_structured(model.half(), ["2"])


@pytest.mark.skipif(not CUDA, reason="no CUDA device of capability 8.0")
def test_outputs_stay_and_layers_are_sparse(caplog: pytest.LogCaptureFixture) -> None:
    model = net()[0].half().cuda().eval()
    inputs = torch.randn(64, 64, device="cuda", dtype=torch.float16)
    expected = model(inputs)
    with caplog.at_level(logging.INFO):
        assert to_semi_structured(model) == ["0", "2"]
    assert "4 stays dense: its shape" in caplog.text
    assert type(model[0].weight.data).__name__.startswith("SparseSemiStructured")
    with torch.no_grad():
        assert torch.allclose(model(inputs), expected, atol=1e-2)


def test_pruned_weights_survive_pytorchs_packing() -> None:
    """The packing that the conversion uses, which runs without a GPU, gives back every weight that a rule has left."""
    packing = pytest.importorskip("torch.sparse._semi_structured_conversions")
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64))
    Pruning(model, {"rules": [{"pattern": "2:4", "target": {"sparsity": 0.5}}]}).prune(model, 0)
    for layer in (model[0], model[2]):
        weight = layer.weight.detach().half()
        values, places = packing.sparse_semi_structured_from_dense_cutlass(weight)
        assert values.shape == (weight.shape[0], weight.shape[1] // 2)
        assert torch.equal(packing.sparse_semi_structured_to_dense_cutlass(values, places), weight)


@pytest.mark.parametrize("pattern", ["2:4", "4x1", "unstructured"])
def test_an_exported_file_keeps_the_zeros(pattern: str, tmp_path: Path) -> None:
    model, pruner = net(pattern)
    export_onnx(model, torch.randn(2, 64), tmp_path / "model.onnx")
    tensors = [numpy_helper.to_array(one) for one in onnx.load(tmp_path / "model.onnx").graph.initializer]
    for name in ("0", "2"):
        weight = model.get_submodule(name).weight.detach().numpy()
        shapes = [one for one in tensors if one.shape in (weight.shape, weight.T.shape)]
        same = [one for one in shapes if np.array_equal(one, weight) or np.array_equal(one.T, weight)]
        assert len(same) == 1, name
        stored = same[0] if np.array_equal(same[0], weight) else same[0].T
        keep = pruner.masks[f"{name}.weight"]
        expected = (
            keep.view(-1, 1, weight.shape[1]).expand(-1, 4, -1).reshape(weight.shape) if pattern == "4x1" else keep
        )
        assert np.array_equal(stored != 0, expected.view(weight.shape).numpy())
        assert pattern != "2:4" or is_two_of_four(torch.from_numpy(stored.copy()))
