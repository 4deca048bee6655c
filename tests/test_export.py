"""ONNX export: what is written agrees with the model, and nothing else about the model or the disk changes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining import Pruning
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.export import compare, precision
from pruningawaretraining.export import onnx as export
from pruningawaretraining.export.onnx import export_onnx
from pruningawaretraining.export.program import export_openvino, export_program
from pruningawaretraining.runtimes import exporter_choice, flat_model, ort

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

needs_dynamo = pytest.mark.skipif(
    exporter_choice.usual_exporter() != "dynamo",
    reason="before PyTorch 2.9 dynamo runs with the onnxscript of its time only",
)
DYNAMO = pytest.param("dynamo", marks=needs_dynamo)


@dataclass
class Scored:
    logits: Tensor
    hidden: Tensor


class TwoInputs(nn.Module):
    """Two tensors and a number in; ``wrap`` decides the form of the output."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.linear, self.norm, self.wrap = nn.Linear(4, 3), nn.BatchNorm1d(3), wrap

    def forward(self, x: Tensor, weight: Tensor, scale: int = 2) -> Any:
        hidden = self.norm(self.linear(x)) * weight * scale
        return self.wrap(hidden.relu(), hidden)


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))


def shapes(path: Path) -> dict[str, list[Any]]:
    graph = onnx.load(str(path)).graph
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


@pytest.mark.parametrize("exporter", [DYNAMO, "torchscript"])
def test_a_cnn_is_one_file_with_a_free_batch(tmp_path: Path, exporter: str) -> None:
    path = tmp_path / "new" / "model.onnx"
    result = export_onnx(cnn(), torch.randn(1, 3, 8, 8), path, exporter=exporter, metadata={"sparsity": 0.5})
    assert (result.path, result.exporter, result.inputs, result.outputs) == (path, exporter, ("input",), ("output",))
    assert result.max_abs_diff < 1e-5 and set(result.batch_sizes) == {1, 2, 3}
    assert shapes(path) == {"input": ["batch", 3, 8, 8], "output": ["batch", 5]}
    assert [item.name for item in path.parent.iterdir()] == ["model.onnx"]
    properties = {item.key: item.value for item in onnx.load(str(path)).metadata_props}
    assert properties["sparsity"] == "0.5" and properties["parameters"] == "215" and properties["batch"] == "dynamic"


@pytest.mark.parametrize(
    ("exporter", "wrap", "outputs"),
    [
        pytest.param("dynamo", Scored, ("logits", "hidden"), marks=needs_dynamo),
        ("torchscript", Scored, ("logits", "hidden")),
        ("torchscript", lambda one, two: (one, [two]), ("output_0", "output_1_0")),
        ("torchscript", lambda one, two: {"x": one, "note": "text", "y": two}, ("x_1", "y")),
    ],
)
def test_several_inputs_and_nested_outputs(tmp_path: Path, exporter: str, wrap: Any, outputs: tuple[str, ...]) -> None:
    inputs = {"x": torch.randn(2, 4), "weight": torch.ones(1, 3), "scale": 3}
    result = export_onnx(TwoInputs(wrap), inputs, tmp_path / "model.onnx", exporter=exporter)
    assert (result.inputs, result.outputs) == (("x", "weight"), outputs)
    assert shapes(result.path)["weight"] == [1, 3]  # not a batch: its first dimension is not that of x
    session = ort.open_session(str(result.path))
    feed = {"x": torch.eye(4), "weight": inputs["weight"]}
    assert ort.checked_run(session, ort.as_arrays(session, feed))[0].shape == (4, 3)


def test_positional_inputs_take_the_names_of_forward(tmp_path: Path) -> None:
    inputs = (torch.randn(2, 4), torch.ones(2, 3))
    result = export_onnx(TwoInputs(Scored), inputs, tmp_path / "m.onnx", exporter="torchscript", dynamic_batch=False)
    assert result.inputs == ("x", "weight") and result.batch_sizes == (2,)
    assert shapes(result.path)["x"] == [2, 4]


def test_an_attention_block_exports_and_the_fast_path_comes_back(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    before = torch.backends.mha.get_fastpath_enabled()
    result = export_onnx(layer, torch.randn(2, 5, 8), tmp_path / "m.onnx", exporter="torchscript")
    assert result.relative_diff < 1e-5 and torch.backends.mha.get_fastpath_enabled() == before


def test_modes_are_restored_module_by_module(tmp_path: Path) -> None:
    model = cnn().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    statistics = model[1].running_mean.clone()
    export_onnx(model, torch.randn(2, 3, 8, 8), tmp_path / "m.onnx", exporter="torchscript")
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ModelError, match="rejects inputs of shape"):
        export_onnx(model, torch.randn(2, 4, 8, 8), tmp_path / "m.onnx")
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[1].running_mean, statistics)


class Untraceable(nn.Module):
    """Adds a number that tracing freezes: the file is right for the example and wrong for other data."""

    def forward(self, x: Tensor) -> Tensor:
        return x + float(x.sum())


def test_a_file_that_disagrees_is_refused_and_the_old_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"precious")
    with pytest.raises(ModelError, match=r"differs from the model by .* tolerance=0.0001"):
        export_onnx(Untraceable(), torch.randn(2, 3), path, exporter="torchscript")
    assert path.read_bytes() == b"precious" and [item.name for item in tmp_path.iterdir()] == ["model.onnx"]


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1).flip(0).relu()


@pytest.mark.parametrize("exporter", [DYNAMO, "torchscript"])
def test_a_model_with_a_fixed_batch_says_what_to_do(tmp_path: Path, exporter: str) -> None:
    with pytest.raises(ModelError, match="dynamic_batch=False"):
        export_onnx(FixedBatch(), torch.randn(2, 3), tmp_path / "m.onnx", exporter=exporter)
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_the_limit_go_to_a_file_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SINGLE_FILE_BYTES", 1000)
    monkeypatch.setattr(precision, "SINGLE_FILE_BYTES", 1000)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    result = export_onnx(model, torch.randn(2, 64), tmp_path / "m.onnx", exporter="torchscript")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    ort.open_session(str(result.path))  # finds its weights


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ConfigError, {"exporter": "dynmo"}, "did you mean 'dynamo'"),
        (ConfigError, {"tolerance": 0.0}, "tolerance: 0.0"),
    ],
)
def test_bad_options(tmp_path: Path, error: type[Exception], options: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        export_onnx(cnn(), torch.randn(1, 3, 8, 8), tmp_path / "m.onnx", **options)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ConfigError, match="onnxscript is needed"):
        export_onnx(cnn(), torch.randn(1, 3, 8, 8), tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("expected", "found", "gap"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([1.0, float("nan")], [1.0, float("nan")], 0.0),
        ([1.0, float("inf")], [1.0, float("inf")], 0.0),
        ([1.0, 2.0], [1.0, float("nan")], float("inf")),
        ([], [], 0.0),
    ],
)
def test_difference(expected: list[float], found: list[float], gap: float) -> None:
    assert compare._difference("y", torch.tensor(expected), torch.tensor(found)) == gap


def test_export_says_nothing_on_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_onnx(cnn(), torch.randn(2, 3, 8, 8), tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("default", "expected"), [(True, "dynamo"), (False, "torchscript")])
def test_auto_is_what_this_pytorch_takes_by_itself(
    default: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = export_onnx(nn.Linear(2, 2), torch.zeros(2, 2), tmp_path / "m.onnx")
    assert found.exporter == exporter_choice.usual_exporter() == exporter_choice.chosen_exporter("AUTO")
    monkeypatch.setattr(torch.onnx, "export", lambda model, dynamo=default: None)
    assert exporter_choice.chosen_exporter("auto") == expected
    assert exporter_choice.chosen_exporter("trace") == "torchscript"


@needs_dynamo
@pytest.mark.parametrize("opset", [9, 99])
def test_an_opset_that_the_exporter_does_not_write_is_refused(opset: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"opset: {opset} is not what the exporter 'dynamo' wrote, which is"):
        export_onnx(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.randn(2, 4), tmp_path / "m.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


# --- free dimensions, precisions, other forms -----------------------------------------------------------------------


class Tokens(nn.Module):
    """Rows of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (self.linear(x) * mask.unsqueeze(-1)).sum(1)


@pytest.mark.parametrize("exporter", [DYNAMO, "torchscript"])
def test_free_dimensions_by_name(tmp_path: Path, exporter: str) -> None:
    inputs = (torch.randn(2, 5, 4), torch.ones(2, 5))
    axes = {"x": {1: "length"}, "mask": {1: "length"}}
    result = export_onnx(Tokens(), inputs, tmp_path / "m.onnx", exporter=exporter, dynamic_axes=axes)
    assert shapes(result.path) == {"x": ["batch", "length", 4], "mask": ["batch", "length"], "output": ["batch", 3]}
    session = ort.open_session(str(result.path))
    longer = {"x": torch.randn(3, 9, 4), "mask": torch.ones(3, 9)}
    assert ort.checked_run(session, ort.as_arrays(session, longer))[0].shape == (3, 3)


def calibration(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(("precision", "dtype", "bound"), [("float16", "FLOAT16", 2e-2), ("int8", "INT8", 0.25)])
def test_precisions_after_pruning(tmp_path: Path, precision: str, dtype: str, bound: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten())
    model.append(nn.Linear(1024, 5)).eval()
    pruner = Pruning(model, {"rules": [{"target": {"macs": 0.5}}]}, example_inputs=torch.randn(1, 3, 8, 8))
    pruner.prune(model, 0)
    whole = export_onnx(model, torch.randn(2, 3, 8, 8), tmp_path / "whole.onnx")
    path = tmp_path / "small.onnx"
    result = export_onnx(model, torch.randn(2, 3, 8, 8), path, precision=precision, calibration=calibration())
    assert result.precision == precision and 0 < result.relative_diff <= bound
    graph = onnx.load(str(path))
    weights = {onnx.TensorProto.DataType.Name(one.data_type) for one in graph.graph.initializer}
    assert dtype in weights and [item.name for item in sorted(tmp_path.iterdir())] == ["small.onnx", "whole.onnx"]
    assert path.stat().st_size < (0.6 if precision == "float16" else 0.5) * whole.path.stat().st_size
    properties = {item.key: item.value for item in graph.metadata_props}
    assert properties["precision"] == precision
    summary = json.loads(properties["pruning"])
    assert summary["kept_macs"] <= 0.5 * summary["macs"] and summary["phase"] == "finetune"
    with pytest.raises(ModelError, match="differs from the model"):
        export_onnx(model, calibration()[0], path, precision=precision, calibration=calibration(), tolerance=1e-9)


def test_precisions_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='calibration: precision="int8" needs data'):
        export_onnx(cnn(), torch.randn(1, 3, 8, 8), tmp_path / "m.onnx", precision="int8", exporter="torchscript")
    with pytest.raises(ConfigError, match="precision: 'flot16' is not known; did you mean 'float16'"):
        export_onnx(cnn(), torch.randn(1, 3, 8, 8), tmp_path / "m.onnx", precision="flot16")
    with pytest.raises(ConfigError, match="dynamic_axes: input: 'inputs' is not known; did you mean 'input'"):
        export_onnx(cnn(), torch.randn(1, 3, 8, 8), tmp_path / "m.onnx", dynamic_axes={"inputs": {2: "height"}})
    with pytest.raises(ConfigError, match="dynamic_axes.input: 7 is not a dimension. Allowed: 0 to 3"):
        export_onnx(cnn(), torch.randn(1, 3, 8, 8), tmp_path / "m.onnx", dynamic_axes={"input": {7: "height"}})
    assert list(tmp_path.iterdir()) == []


class Scaled(nn.Module):
    """Takes two inputs, of which one may be missing in a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(x) * mask


LABELLED = [(torch.randn(2, 4), torch.ones(2, 1), torch.tensor([0, 1])) for _ in range(3)]


@pytest.mark.parametrize(
    ("example", "batches"),
    [
        ((torch.randn(2, 4), torch.ones(2, 1)), LABELLED),
        ((torch.randn(2, 4), torch.ones(2, 1)), [[[x, mask], label] for x, mask, label in LABELLED]),
        ((torch.randn(2, 4), torch.ones(2, 1)), [{"label": label, "mask": m, "x": x} for x, m, label in LABELLED]),
        ({"x": torch.randn(2, 4), "mask": torch.ones(2, 1)}, [({"mask": m, "x": x}, y) for x, m, y in LABELLED]),
    ],
)
def test_calibration_takes_batches_with_labels(tmp_path: Path, example: Any, batches: list[Any]) -> None:
    graph = flat_model.build_graph(Scaled(), example)
    for batch, (x, mask, _) in zip(batches, LABELLED, strict=True):
        found = dict(zip(graph.input_names, flat_model.batch_of(graph, example, batch, "calibration[0]"), strict=True))
        assert torch.equal(found["x"], x) and torch.equal(found["mask"], mask)


def test_a_loader_with_labels_calibrates(tmp_path: Path) -> None:
    images = torch.utils.data.TensorDataset(torch.cat(calibration(1)), torch.arange(8))
    loader = torch.utils.data.DataLoader(images, 4)
    example = torch.randn(1, 3, 8, 8)
    result = export_onnx(
        cnn(), example, tmp_path / "m.onnx", precision="int8", exporter="torchscript", calibration=loader
    )
    assert result.precision == "int8" and result.batch_sizes == (4,)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.randn(2, 4), "1 tensors. Expected: 2, x, mask"),
        ({"x": torch.randn(2, 4)}, r"'mask' is missing of x. Expected: \['x', 'mask'\]"),
        ((torch.randn(2, 5), torch.ones(2, 1)), r"x is torch.float32 of shape \(2, 5\). Expected: .* \(batch, 4\)"),
        ((torch.randn(4), torch.ones(2, 1)), r"x is torch.float32 of shape \(4,\)"),
        ((torch.ones(2, 4, dtype=torch.uint8), torch.ones(2, 1)), "x is torch.uint8 .* Expected: torch.float32"),
    ],
)
def test_calibration_that_does_not_fit(tmp_path: Path, batch: Any, message: str) -> None:
    example = (torch.randn(2, 4), torch.ones(2, 1))
    with pytest.raises(ModelError, match=rf"^calibration\[1\]: {message}"):
        export_onnx(Scaled(), example, tmp_path / "m.onnx", precision="int8", calibration=[LABELLED[0], batch])
    with pytest.raises(ModelError, match=r"calibration\[0\]: a Tensor. Expected: a mapping with x, mask"):
        keyed = dict(zip(("x", "mask"), example, strict=True))
        export_onnx(Scaled(), keyed, tmp_path / "m.onnx", precision="int8", calibration=[torch.randn(2, 4)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamic_axes": {"input": {1: "c"}}}, r"dynamic_axes.input: dimension 1 \('c'\) is 3, .* 6, 1, 4"),
        ({"dynamic_axes": {"input": [2, 3]}}, r"dynamic_axes.input: \[2, 3\] names nothing"),
        ({"dynamic_axes": {"input": {2: "a b"}}}, "dynamic_axes.input: 'a b', of dimension 2, is not a name"),
        ({"metadata": {"pruning": 1}}, "metadata: 'pruning' is an entry of this library"),
    ],
)
def test_options_are_refused_before_the_export(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export_onnx(cnn(), torch.randn(1, 3, 8, 8), tmp_path / "m.onnx", **options)
    with pytest.raises(ConfigError, match="path: .* is a folder"):
        export_onnx(cnn(), torch.randn(1, 3, 8, 8), tmp_path)
    assert not list(tmp_path.iterdir())


def test_free_height_and_width(tmp_path: Path) -> None:
    axes = {"input": {2: "height", 3: "width"}}
    path = export_onnx(cnn(), torch.randn(2, 3, 8, 8), tmp_path / "m.onnx", dynamic_axes=axes).path
    assert shapes(path)["input"] == ["batch", 3, "height", "width"]


@needs_dynamo
def test_opsets_and_half_models_say_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'dynamo' mostly 14 to 26, 'torchscript' mostly 7 to 23"):
        export_onnx(nn.Linear(4, 2), torch.randn(2, 4), tmp_path / "m.onnx", opset=9)
    assert "The model is in float16: allow tolerance=0.02, or model.float() and" in export._half(nn.Linear(2, 2).half())
    assert export._half(nn.Linear(2, 2)) == ""


def test_a_program_of_torch_export(tmp_path: Path) -> None:
    model = cnn().train()
    assert export_program(model, torch.randn(2, 3, 8, 8), tmp_path / "m.pt2") < 1e-5
    program = torch.export.load(tmp_path / "m.pt2").module()
    images = torch.randn(5, 3, 8, 8)
    assert torch.allclose(program(images)[0], model.eval()(images), atol=1e-5)
    with pytest.raises(ModelError, match="torch.export cannot export .*dynamic_batch=False"):
        export_program(FixedBatch(), torch.randn(2, 3), tmp_path / "n.pt2")
    assert [one.name for one in tmp_path.iterdir()] == ["m.pt2"]


def test_openvino(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model = cnn().eval()
    images = torch.randn(2, 3, 8, 8)
    assert export_openvino(model, images, tmp_path / "m.xml") < 1e-3
    assert sorted(one.name for one in tmp_path.iterdir()) == ["m.bin", "m.xml"]
    found = torch.from_numpy(openvino.compile_model(str(tmp_path / "m.xml"), "CPU")([images.numpy()])[0])
    assert torch.allclose(found, model(images), atol=0.05)


def test_openvino_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(ConfigError, match="openvino is needed here and not installed"):
        export_openvino(cnn(), torch.randn(1, 3, 8, 8), tmp_path / "m.xml")
