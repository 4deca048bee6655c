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
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.export.semi_structured import convert, is_two_of_four
from pruningawaretraining.export.semi_structured_choice import GAIN, Setting, choose

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
    with caplog.at_level(logging.INFO, logger="pruningawaretraining"):
        found = to_semi_structured(model, example_inputs=inputs, only_faster=False)
    assert found == ["0", "2"] and {one.rows for one in found.layers} == {64}
    assert all(one.dense_ms > 0 and one.sparse_ms and one.setting for one in found.layers)
    assert "4 stays dense: its shape" in caplog.text and "times as fast" in caplog.text
    assert type(model[0].weight.data).__name__.startswith("SparseSemiStructured")
    with torch.no_grad():
        assert torch.allclose(model(inputs), expected, atol=1e-2)


@pytest.mark.skipif(not CUDA, reason="no CUDA device of capability 8.0")
@pytest.mark.parametrize("size", [64, 1024])
def test_no_layer_gets_slower(size: int) -> None:
    """Whatever was measured, a layer that is sparse now was faster so, and one that was not is dense."""
    layer = nn.Sequential(nn.Linear(size, size)).half().cuda()
    Pruning(layer, {"rules": [{"pattern": "2:4", "target": {"sparsity": 0.5}}]}).prune(layer, 0)
    (speed,) = to_semi_structured(layer, rows=size).layers
    assert speed.converted is (speed.speedup is not None and speed.speedup >= GAIN)
    assert type(layer[0].weight.data).__name__.startswith("SparseSemiStructured") is speed.converted


CUTLASS, FIRST, FUSED = Setting("cutlass"), Setting("cusparselt"), Setting("cusparselt", 3, True)


@pytest.mark.parametrize(
    ("dense", "sparse", "only_faster", "setting", "converted", "speedup"),
    [
        (1.0, {CUTLASS: 0.8, FIRST: 0.9, FUSED: 0.5}, True, FUSED, True, 2.0),
        (1.0, {CUTLASS: 0.4, FIRST: 0.9, FUSED: 0.5}, True, CUTLASS, True, 2.5),
        (0.39, {CUTLASS: 1.36, FIRST: 2.0}, True, CUTLASS, False, 0.39 / 1.36),
        (0.39, {CUTLASS: 1.36, FIRST: 2.0}, False, CUTLASS, True, 0.39 / 1.36),
        (1.0, {FIRST: 0.99}, True, FIRST, False, 1 / 0.99),
        (1.0, {FIRST: 1.0}, True, FIRST, False, 1.0),
        (1.0, {}, True, None, False, None),
        (1.0, {}, False, None, False, None),
    ],
)
def test_the_fastest_is_chosen_and_a_slower_one_is_not(
    dense: float, sparse: dict[Setting, float], only_faster: bool, setting: Any, converted: bool, speedup: Any
) -> None:
    found = choose("layer", 16, dense, sparse, only_faster)
    assert (found.setting, found.converted, found.speedup) == (setting, converted, speedup)
    assert str(found).startswith("layer is sparse" if converted else "layer stays dense")


class MadeUp:
    """A bench without a GPU: packed weights are dense copies; some settings fail, or compute something else."""

    def __init__(self, times: dict[Setting, float], dense: float = 1.0) -> None:
        self.times, self.dense, self.packed, self.rows = times, dense, [], []

    def settings(self, weight_OI: Any, given_NI: Any, bias: Any) -> list[Setting]:
        self.packed = []
        self.rows.append(len(given_NI))
        return [CUTLASS, FIRST, FUSED]

    def pack(self, weight_OI: Any, setting: Setting) -> Any:
        if setting not in self.times:
            raise RuntimeError("not supported on this device")
        if self.times[setting] > 0:
            self.packed.append(setting)
        return weight_OI.clone() if self.times[setting] > 0 else weight_OI * 1.5

    def milliseconds(self, runs: Any, given_NI: Any) -> list[float]:
        assert len(runs) == 1 + len(self.packed) and all(run().is_contiguous() for run in runs)
        return [self.dense, *(self.times[one] for one in self.packed)]


def layers_of(model: nn.Sequential) -> dict[str, nn.Linear]:
    return {"0": model[0], "2": model[2]}


@pytest.mark.parametrize(
    ("times", "setting"),
    [
        ({CUTLASS: 0.5, FIRST: 0.7, FUSED: 0.6}, CUTLASS),
        ({FIRST: 0.7, FUSED: 0.6}, FUSED),
        ({CUTLASS: -1.0, FIRST: 0.7}, FIRST),  # CUTLASS computes something else
    ],
    ids=["all", "one fails", "one is wrong"],
)
def test_only_what_computes_the_layer_is_chosen(
    times: dict[Setting, float], setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    model = net()[0]
    before = model[0].weight.detach().clone()
    bench = MadeUp(times)
    with caplog.at_level(logging.INFO, logger="pruningawaretraining"):
        found = convert(layers_of(model), {"0": 32, "2": 48}, bench, True)
    assert found == ["0", "2"] and bench.rows == [32, 48]
    assert {one.setting for one in found.layers} == {setting}
    assert torch.equal(model[0].weight, before) and not model[0].weight.requires_grad
    assert found.speedup == pytest.approx(1 / times[setting])
    assert ("and is left out" in caplog.text) is (min(times.values()) < 0)
    assert f"0 is sparse: {setting.backend} takes" in caplog.text


def test_what_is_not_faster_stays_dense_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = net()[0]
    weights = [model[0].weight, model[2].weight]
    with caplog.at_level(logging.WARNING, logger="pruningawaretraining"):
        found = convert(layers_of(model), {"0": 8}, MadeUp({CUTLASS: 1.36}, dense=0.39), True)
    assert found == [] and found.speedup == 1.0
    assert "0 stays dense: cutlass takes 1.36 ms, 0.39 ms dense, on 8 rows: 0.29 times as fast" in caplog.text
    assert "2 stays dense: the example inputs do not reach it" in caplog.text
    assert [model[0].weight, model[2].weight] == weights and weights[0].requires_grad
    with caplog.at_level(logging.WARNING, logger="pruningawaretraining"):
        assert convert(layers_of(model), {"0": 8}, MadeUp({}), True) == []
    assert "0 stays dense: no backend for sparse products runs it" in caplog.text


def test_slower_layers_are_converted_where_memory_matters() -> None:
    model = net()[0]
    found = convert(layers_of(model), {"0": 8, "2": 8}, MadeUp({FUSED: 2.0}), only_faster=False)
    assert found == ["0", "2"] and found.speedup == 0.5


@pytest.mark.parametrize("rows", [0, True, 1.5])
def test_rows_are_a_number(rows: Any) -> None:
    with pytest.raises(ConfigError, match="rows: .* is not a whole number of at least 1"):
        to_semi_structured(net()[0].half(), rows=rows)


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
