"""int8 after pruning: agreement that is measured and told, per-channel weights, the worst layers, early checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining import export_onnx
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.export import onnx as exporting
from pruningawaretraining.export.int8 import Int8

SIZE, CLASSES, HUGE = 16, 8, 1000.0


class Net(nn.Module):
    """Three linear layers; the first input, and so the first channel of the first layer, is always 0.

    Weights on what is always 0 change nothing, but they are quantized with the others.

    Args:
        filter_: the first filter's weight on it: with one scale for all filters, the other filters become 0.
        column: every filter's weight on it in the second layer: with a scale for each filter, too, they become 0.
    """

    def __init__(self, filter_: float = 0.0, column: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, CLASSES)
        self.relu = nn.ReLU()
        with torch.no_grad():
            self.first.weight[0], self.first.bias[0] = 0.0, 0.0
            self.first.weight[0, 0] = filter_
            self.second.weight[:, 0] = column

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.second(self.first(x).relu())))


def data(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(32, SIZE, generator=generator).index_fill(1, torch.tensor([0]), 0.0) for _ in range(count)]
    return [(one, Net().eval()(one).argmax(1)) for one in batches]


def exported(model: nn.Module, path: Path, **options: Any) -> exporting.ExportResult:
    precision = {"type": "int8", **options}
    settings = {"precision": precision, "calibration": data(), "exporter": "torchscript", "tolerance": 10.0}
    return export_onnx(model.eval(), torch.randn(2, SIZE), path, **settings)


def test_agreement_is_measured_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="pruningawaretraining"):
        result = exported(Net(), tmp_path / "m.onnx")
    found = result.agreement
    assert found.rows == 256 and found.same > 0.95 and found.model_accuracy == 1.0 and found.accuracy == found.same
    assert result.precision == "int8" and result.excluded == () and not result.layer_errors
    text = f"m.onnx: int8 agrees with the model on {found.same:.1%} of 256 rows of the calibration data (accuracy "
    assert text + f"{found.same:.1%}, the model's 100.0%)" in caplog.text


def test_weights_per_channel_save_a_model_with_one_large_filter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    each = exported(Net(filter_=HUGE), tmp_path / "each.onnx")
    assert each.agreement.same > 0.95 and caplog.text == ""
    one = exported(Net(filter_=HUGE), tmp_path / "one.onnx", per_channel=False)
    assert one.agreement.same < 0.7
    wanted = f"one.onnx: int8 agrees with the model on {one.agreement.same:.1%} of 256 rows"
    assert wanted in caplog.text and "98.0% is asked for. Allowed: more calibration data" in caplog.text


def quantized_weights(path: Path) -> int:
    return sum(
        one.data_type == onnx.TensorProto.INT8 and len(one.dims) == 2 for one in onnx.load(path).graph.initializer
    )


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_the_worst_layer_is_found_and_left_in_float(tmp_path: Path, exporter: str) -> None:
    model = Net(column=HUGE).eval()
    common: dict[str, Any] = {"calibration": data(), "exporter": exporter, "tolerance": 10.0}
    example, path = torch.randn(2, SIZE), tmp_path / "m.onnx"
    spoiled = export_onnx(model, example, path, precision="int8", **common)
    assert spoiled.agreement.same < 0.7 and quantized_weights(path) == 3
    found = export_onnx(model, example, path, precision=Int8(exclude=1), **common)
    assert found.excluded == ("second",) and quantized_weights(path) == 2
    assert list(found.layer_errors)[0] == "second" and set(found.layer_errors) == {"first", "second", "head"}
    worst, *others = found.layer_errors.values()
    assert worst > 10 * max(others) and found.agreement.same > 0.95
    named = export_onnx(model, example, path, precision={"type": "int8", "exclude": ["second"]}, **common)
    assert named.agreement == found.agreement and named.excluded == ("second",)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 1))
        self.token = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.token(self.stages(x).flatten(2).transpose(1, 2))


def test_layers_go_by_the_names_of_the_models_modules(tmp_path: Path) -> None:
    batches = [torch.randn(4, 2, 3, 3) for _ in range(2)]
    common: dict[str, Any] = {"calibration": batches, "exporter": "torchscript"}
    result = export_onnx(Nested().eval(), batches[0], tmp_path / "m.onnx", precision=Int8(exclude=3), **common)
    assert set(result.excluded) == {"stages.0.0", "stages.1", "token"}
    whole = export_onnx(Nested().eval(), batches[0], tmp_path / "m.onnx", precision="int8", **common)
    assert result.agreement.same == 1.0 and result.agreement.accuracy is None
    assert result.layer_errors["token"] > 0 and whole.excluded == ()


def test_a_container_leaves_the_layers_in_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    batches = [torch.randn(4, 2, 3, 3) for _ in range(2)]
    common: dict[str, Any] = {"calibration": batches, "exporter": "torchscript"}
    named = Int8(exclude=["stages.1", "stages"])
    result = export_onnx(Nested().eval(), batches[0], tmp_path / "m.onnx", precision=named, **common)
    assert result.excluded == ("stages.1", "stages.0.0") and quantized_weights(tmp_path / "m.onnx") == 1
    assert "nothing of the file is in 8 bits" not in caplog.text
    with pytest.raises(ConfigError, match="exclude: 4 layers, and the model has 3. Allowed: fewer"):
        export_onnx(Nested().eval(), batches[0], tmp_path / "n.onnx", precision=Int8(exclude=4), **common)
    assert not (tmp_path / "n.onnx").exists()
    everything = Int8(exclude=["stages", "token"])
    export_onnx(Nested().eval(), batches[0], tmp_path / "m.onnx", precision=everything, **common)
    assert "exclude: 3 of 3 layers stay in float32, so nothing of the file is in 8 bits" in caplog.text


def test_labels_that_are_no_decisions_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As one-hot rows, whole numbers: accuracy was left out in silence."""
    batches = [(one, nn.functional.one_hot(label, CLASSES)) for one, label in data(1)]
    common: dict[str, Any] = {"calibration": batches, "exporter": "torchscript"}
    result = export_onnx(Net().eval(), torch.randn(2, SIZE), tmp_path / "m.onnx", precision="int8", **common)
    assert result.agreement.accuracy is None
    assert "labels of shape (32, 8) are not one for each decision, of shape (32,): no accuracy" in caplog.text


def test_outputs_without_classes_have_no_agreement(tmp_path: Path) -> None:
    batches = [torch.randn(4, 6) for _ in range(2)]
    for model in (nn.Linear(6, 1), nn.Sequential(nn.Linear(6, 5), nn.Unflatten(1, (5, 1, 1, 1)))):
        result = export_onnx(
            model.eval(), batches[0], tmp_path / "m.onnx", precision="int8", calibration=batches, exporter="torchscript"
        )
        assert result.agreement is None


def test_data_checks_float16_too(tmp_path: Path) -> None:
    result = export_onnx(
        Net().eval(), torch.randn(2, SIZE), tmp_path / "m.onnx", precision="half", calibration=data(2),
        exporter="torchscript",
    )  # fmt: skip
    assert result.precision == "float16" and result.agreement.rows == 64 and result.agreement.same > 0.98


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": {"type": "int8", "per_chanel": True}}, ConfigError, "did you mean 'per_channel'"),
        ({"precision": {"type": "int8", "per_channel": 1}}, ConfigError, "per_channel: 1 is not"),
        ({"precision": {"type": "int8", "exclude": -1}}, ConfigError, "exclude: -1 is not allowed"),
        ({"precision": {"type": "int8", "agreement": 1.5}}, ConfigError, "agreement: 1.5 is not allowed"),
        ({"precision": {"type": "int8", "exclude": ["secnd"]}}, ConfigError, "did you mean 'second'"),
        ({"precision": {"type": "int8", "exclude": ["relu"]}}, ConfigError, "'relu' is not known. Allowed: first, "),
        ({"precision": "int8", "calibration": []}, ConfigError, "needs data"),
        (
            {"precision": "int8", "calibration": [data(1)[0], (torch.randn(32, SIZE), torch.zeros(31).long())]},
            ModelError,
            r"calibration\[1\]: 31 labels of 32 rows. Expected: one for each",
        ),
        (
            {"precision": "int8", "calibration": [torch.full((2, SIZE), torch.nan)]},
            ModelError,
            r"calibration\[0\]: x has",
        ),
        ({"precision": 8}, ConfigError, "precision: 8 is not a precision. Allowed: float16, float32, int8"),
    ],
)
def test_what_cannot_be_is_said_before_the_export(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the long work has begun")

    monkeypatch.setattr(exporting, "export_graph", never)
    with pytest.raises(error, match=message):
        export_onnx(Net().eval(), torch.randn(2, SIZE), tmp_path / "m.onnx", **{"calibration": data(1), **options})
    assert list(tmp_path.iterdir()) == []


def test_a_node_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exclude: '/model/secnd/Gemm' is not known"):
        exported(Net(), tmp_path / "m.onnx", exclude=["/model/secnd/Gemm"])
    found = exported(Net(), tmp_path / "m.onnx", exclude=["/model/second/Gemm"])
    assert found.excluded == ("second",)
