"""Pruning and quantization-aware training together, in either order: masks, scales, removal, conversion, export."""

from __future__ import annotations

import copy
import importlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining import Pruning, export_onnx, load_pruned, save_pruned
from pruningawaretraining.errors import CheckpointError, ModelError
from pruningawaretraining.models.fake_quant import resting

pytest.importorskip("torchao", reason="pip install torchao")
from torchao.quantization import (  # noqa: E402
    Int4WeightOnlyConfig,
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    quantize_,
)
from torchao.quantization.pt2e import move_exported_model_to_eval  # noqa: E402
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e  # noqa: E402
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (  # noqa: E402
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig, initialize_fake_quantizers  # noqa: E402

RULE = {"target": {"sparsity": 0.5}, "end": 2, "scope": "local"}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- linear layers, quantized in place --------------------------------------------------------------------------


class Mlp(nn.Module):
    """A hidden layer that reads values with f(0) != 0, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sigmoid(self.second(torch.relu(self.first(x)))))


INT4 = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerAxis(0))
INT8 = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
FIXED = {"is_dynamic": False, "range_learning": True}
PRECISE = {"scale_precision": torch.float32, "zero_point_precision": torch.float32}
LEARNED = QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int4, "per_channel", **FIXED, **PRECISE), step="prepare")
PREPARE = {"int4": QATConfig(INT4, step="prepare"), "int8": QATConfig(INT8, step="prepare"), "learned": LEARNED}
X = numbers(8, 32)


def mlp(prepare: QATConfig | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = Mlp()
    if prepare is not None:
        quantize_(model, prepare)
        initialize_fake_quantizers(model, (X,))
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor = X) -> None:
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def pruner_of(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor = X, **rule: Any) -> Pruning:
    return Pruning(model, {"rules": [{**RULE, **rule}]}, example_inputs=inputs, optimizer=optimizer)


@pytest.mark.parametrize("name", PREPARE)
def test_masks_hold_through_fake_quantization_and_removal_changes_nothing(name: str) -> None:
    model = mlp(PREPARE[name])
    optimizer = adamw(model)
    pruner = pruner_of(model, optimizer)
    assert [row["source"] for row in pruner.describe_sets()] == ["first", "second"]
    pruner.prune(model, 0)
    for _ in range(5):
        step(model, optimizer)
    keep = pruner.masks
    seen = model.second.weight_fake_quantizer(model.second.weight)
    assert (seen[~keep["second"]] == 0).all()
    assert (seen[:, ~keep["first"]] == 0).all()
    assert (seen[keep["second"]][:, keep["first"]] != 0).any()
    masked, scale = model(X), model.second.weight_fake_quantizer.scale
    pruner.remove()
    assert model.second.weight.shape == (int(keep["second"].sum()), int(keep["first"].sum()))
    assert torch.allclose(model(X), masked, atol=1e-6)
    assert torch.equal(model.second.weight_fake_quantizer.scale, scale[keep["second"]])
    before = model.second.weight.detach().clone()
    step(model, optimizer)
    assert not torch.equal(model.second.weight, before)


def test_learned_scales_are_sliced_with_their_optimizer_state() -> None:
    model = mlp(LEARNED)
    optimizer = adamw(model)
    pruner = pruner_of(model, optimizer)
    for epoch in range(2):
        step(model, optimizer)
        pruner.prune(model, epoch)
    old = model.first.weight_fake_quantizer.scale
    values, moments = old.detach().clone(), optimizer.state[old]["exp_avg_sq"].clone()
    pruner.remove()
    new, keep = model.first.weight_fake_quantizer.scale, pruner.masks["first"]
    assert isinstance(new, nn.Parameter)
    assert torch.equal(new, values[keep])
    assert torch.equal(optimizer.state[new]["exp_avg_sq"], moments[keep])
    assert {id(one) for group in optimizer.param_groups for one in group["params"]} == set(map(id, model.parameters()))


@pytest.mark.parametrize("when", ["before anything", "while masked", "after removal"])
def test_linear_layers_are_prepared_at_any_time(when: str, tmp_path: Path) -> None:
    model = mlp(PREPARE["int4"] if when == "before anything" else None)
    optimizer = adamw(model)
    pruner = pruner_of(model, optimizer)
    for epoch in range(5):
        step(model, optimizer)
        if epoch == {"while masked": 1, "after removal": 3}.get(when):
            quantize_(model, PREPARE["int4"])
        pruner.prune(model, epoch)
        for name, keep in pruner.masks.items():
            layer = model.get_submodule(name)
            assert len(layer.weight) == int(keep.sum()) or (layer.weight[~keep] == 0).all()
    assert pruner.phase == "finetune"
    assert type(model.second).__name__ == "FakeQuantizedLinear"
    assert (model.second.in_features, model.second.out_features) == tuple(model.second.weight.shape[::-1]) == (32, 32)
    model.eval()
    save_pruned(model, tmp_path / "mlp.safetensors")
    again = load_pruned(mlp(), tmp_path / "mlp.safetensors")
    expected = model(X)
    quantize_(model, QATConfig(INT4, step="convert"))
    assert torch.allclose(model(X), expected, atol=1e-6)
    quantize_(again, INT4)
    assert torch.allclose(again(X), expected, atol=1e-6)
    exported = torch.export.export(model, (X,)).module()
    assert torch.allclose(exported(X), expected, atol=1e-6)
    assert export_onnx(model, X, tmp_path / "mlp.onnx").max_abs_diff < 1e-4


@pytest.mark.parametrize(
    ("prepare", "rule", "message"),
    [
        (QATConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(16)), step="prepare"), {"multiple": 16}, None),
        (
            QATConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(16)), step="prepare"),
            {"target": {"sparsity": 0.3}},
            "second: 63 inputs are left for groups of 16 input columns, .* multiple: 16 in the rule",
        ),
        (
            QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=16, **FIXED, **PRECISE)),
            {"multiple": 16},
            "second: its scales are fixed for groups of 16 input columns, .* removal before it is prepared",
        ),
    ],
    ids=["multiple", "torn", "learned"],
)
def test_scales_of_groups_of_columns(prepare: QATConfig, rule: dict[str, Any], message: str | None) -> None:
    model = mlp(prepare)
    optimizer = adamw(model)
    if message is None:
        pruner = pruner_of(model, optimizer, **{"end": 0, **rule})
        pruner.prune(model, 0)
        assert (model.second.in_features, pruner.phase) == (32, "finetune")
        step(model, optimizer)
        assert model.second.weight_fake_quantizer.scale.shape == (32, 2)
        return
    before = model.second.weight.detach().clone()
    with pytest.raises(ModelError, match=message):
        pruner_of(model, optimizer, **{"end": 0, **rule})
    assert torch.equal(model.second.weight, before)
    step(model, optimizer)


def test_schemes_without_a_zero_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for prepare in PREPARE.values():
            pruner_of(model := mlp(prepare), adamw(model))
    assert not caplog.records
    model = mlp(QATConfig(Int4WeightOnlyConfig(group_size=32), step="prepare"))
    pruner_of(model, adamw(model), multiple=32)
    assert "second: its fake quantizer does not keep zeros" in caplog.text


def test_converted_models_are_refused_by_name(tmp_path: Path) -> None:
    model = mlp()
    quantize_(model, INT8)
    with pytest.raises(ModelError, match="last: its weight is quantized already; prune before it is converted"):
        Pruning(model, {"rules": [RULE]}, example_inputs=X)
    with pytest.raises(CheckpointError, match="'first.weight' is quantized already .* save_pruned before it is"):
        save_pruned(model, tmp_path / "mlp.safetensors")


# --- convolutions, in an exported graph -------------------------------------------------------------------------


class ConvNet(nn.Module):
    """A residual block with a depthwise convolution; batch norms behind every convolution."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), norm(16)
        self.depth, self.norm1 = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.wide, self.norm2 = nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32)
        self.back, self.norm3 = nn.Conv2d(32, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.drop, self.fc = nn.Dropout(0.1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(self.norm2(self.wide(torch.relu(self.norm1(self.depth(x))))))
        return self.fc(self.drop((x + self.norm3(self.back(y))).mean((2, 3))))


IMAGES = numbers(8, 3, 8, 8)


def graph_of(model: nn.Module, prepare: bool = True, dynamic: bool = True) -> torch.fx.GraphModule:
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    graph = torch.export.export(model, (IMAGES,), dynamic_shapes=shapes).module()
    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    return prepare_qat_pt2e(graph, quantizer) if prepare else graph


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return ConvNet().train()


def evaluated(graph: torch.fx.GraphModule) -> Tensor:
    """What a graph gives with fake quantization, in eval mode and with its observers at rest; it is not changed."""
    graph = copy.deepcopy(graph)
    move_exported_model_to_eval(graph)
    for name, buffer in graph.named_buffers():
        if name.endswith("observer_enabled"):
            buffer.zero_()
    with torch.no_grad():
        return graph(IMAGES)


def train(graph: nn.Module, optimizer: torch.optim.Optimizer, count: int, first: int = 1) -> None:
    for number in range(first, first + count):
        step(graph, optimizer, numbers(8, 3, 8, 8, seed=number))


def quantizers(graph: torch.fx.GraphModule) -> dict[str, nn.Module]:
    """Name of a weight -> its fake quantizer."""
    found = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and graph.get_submodule(node.target).__class__.__name__.startswith("Fused"):
            source = node
            while source.args and isinstance(source.args[0], torch.fx.Node):
                source = source.args[0]
            if source.op == "get_attr":
                found[source.target] = graph.get_submodule(node.target)
    return found


def started() -> tuple[nn.Module, torch.fx.GraphModule, torch.optim.Optimizer, Pruning]:
    """A model whose graph was prepared first, then masked, and trained on."""
    model = conv_net()
    graph = graph_of(model)
    optimizer = sgd(graph)
    pruner = pruner_of(model, optimizer, IMAGES)
    pruner.follow(graph)
    train(graph, optimizer, 3)
    pruner.prune(model, 0)
    train(graph, optimizer, 3, first=4)
    return model, graph, optimizer, pruner


def test_masks_hold_in_a_prepared_graph() -> None:
    model, graph, _, pruner = started()
    keep = pruner.masks
    assert int((~keep["wide"]).sum()) > 0
    assert (graph.get_parameter("wide.weight")[~keep["wide"]] == 0).all()
    assert (graph.get_parameter("back.weight")[:, ~keep["wide"]] == 0).all()
    assert (graph.get_parameter("norm2.bias")[~keep["wide"]] == 0).all()
    assert graph.get_parameter("norm2.weight")[~keep["wide"]].abs().min() > 0.9  # the graph divides by it
    fake = quantizers(graph)["back.weight"]
    assert (fake(graph.get_parameter("back.weight"))[:, ~keep["wide"]] == 0).all()
    assert torch.isfinite(evaluated(graph)).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in graph.parameters())


def test_removal_slices_scales_and_groups_of_a_prepared_graph() -> None:
    model, graph, optimizer, pruner = started()
    keep, before = pruner.masks, evaluated(graph)
    old = {
        name: (one.scale.clone(), one.activation_post_process.max_val.clone())
        for name, one in quantizers(graph).items()
    }
    others = {
        name: one.scale.clone() for name, one in graph.named_modules() if getattr(one, "is_per_channel", None) is False
    }
    momentum = optimizer.state[model.wide.weight]["momentum_buffer"].clone()
    pruner.remove()
    assert torch.allclose(evaluated(graph), before, atol=1e-5 * float(before.abs().max()))
    for name, one in quantizers(graph).items():
        mine = (
            keep[{"depth": "stem", "back": "stem"}.get(name.split(".")[0], name.split(".")[0])]
            if "fc" not in name
            else ...
        )
        assert torch.equal(one.scale, old[name][0][mine]), name
        assert torch.equal(one.activation_post_process.max_val, old[name][1][mine]), name
    for name, scale in others.items():
        assert torch.equal(graph.get_submodule(name).scale, scale)
    convs = [node for node in graph.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    assert [node.args[6] for node in convs if len(node.args) > 6] == [int(keep["stem"].sum())]
    assert all(graph.get_parameter(name) is one for name, one in model.named_parameters())
    assert graph.get_buffer("norm1.running_mean") is model.norm1.running_mean
    assert {id(one) for group in optimizer.param_groups for one in group["params"]} == set(map(id, model.parameters()))
    expected = momentum[keep["wide"]][:, keep["stem"]]
    assert torch.equal(optimizer.state[model.wide.weight]["momentum_buffer"], expected)
    train(graph, optimizer, 2, first=7)
    assert torch.isfinite(evaluated(graph)).all()


@pytest.mark.parametrize("order", ["prepared, masked, removed", "masked, prepared, removed", "removed, prepared"])
def test_either_order_is_converted_and_exported(order: str, tmp_path: Path) -> None:
    model = conv_net()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer, IMAGES)
    graph: torch.fx.GraphModule | None = None
    for epoch in range(5):
        if epoch == {"prepared, masked, removed": 0, "masked, prepared, removed": 2, "removed, prepared": 3}[order]:
            graph = graph_of(model)
            pruner.follow(graph)
        train(graph or model, optimizer, 2, first=3 * epoch)
        pruner.prune(model, epoch)
    assert graph is not None
    assert pruner.phase == "finetune"
    assert (model.wide.in_channels, model.wide.out_channels, model.depth.groups) == (8, 16, 8)
    expected = evaluated(graph)
    move_exported_model_to_eval(graph)
    converted = convert_pt2e(graph)
    assert converted._frozen_param0.dtype is torch.int8
    with torch.no_grad():
        actual = converted(IMAGES)
    scale = float(expected.abs().max())
    assert torch.allclose(actual, expected, atol=0.05 * scale)  # one rounding step of one activation, at most a few
    with torch.no_grad():
        assert torch.equal(torch.export.export(converted, (IMAGES,)).module()(IMAGES), actual)
    if order == "prepared, masked, removed":  # the longest part of this test
        assert export_onnx(converted, IMAGES, tmp_path / "net.onnx", tolerance=0.1).batch_sizes
    save_pruned(model, tmp_path / "net.safetensors")
    again = load_pruned(conv_net(), tmp_path / "net.safetensors").eval()
    assert torch.equal(again(IMAGES), model.eval()(IMAGES))


def test_a_state_brings_model_and_graph_to_where_they_were() -> None:
    model, graph, _, pruner = started()
    pruner.remove()
    state, weights = pruner.state_dict(), graph.state_dict()
    fresh = conv_net()
    other = graph_of(fresh)
    second = pruner_of(fresh, sgd(other), IMAGES)
    second.follow(other)
    second.load_state_dict(state)
    other.load_state_dict(weights)
    assert torch.equal(evaluated(other), evaluated(graph))
    assert torch.equal(fresh.wide.weight, model.wide.weight)


class Written(ConvNet):
    """A width that export writes into the graph, and the model itself asks for."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.fc((x + torch.zeros(x.shape[1:])).mean((2, 3)))


def test_a_removal_that_the_graph_cannot_follow_is_undone() -> None:
    torch.manual_seed(0)
    model = Written().train()
    graph = graph_of(model, prepare=False)
    optimizer = sgd(graph)
    pruner = pruner_of(model, optimizer, IMAGES, layers=["stem"])
    pruner.follow(graph)
    pruner.prune(model, 0)
    before, code = graph(IMAGES), graph.code
    with pytest.raises(ModelError, match="removed model does not run.*put back as it was"):
        pruner.remove()
    assert graph.code == code
    assert graph.get_parameter("stem.weight") is model.stem.weight
    assert torch.equal(graph(IMAGES), before)


def test_what_cannot_follow_is_refused_by_name() -> None:
    model = conv_net()
    graph = graph_of(model)
    with pytest.raises(ModelError, match=r"its layers are gone. Give the model .* pruner.follow\(graph\)"):
        Pruning(graph, {"rules": [RULE]}, example_inputs=IMAGES)
    pruner = pruner_of(model, sgd(model), IMAGES)
    with pytest.raises(ModelError, match="graph: ConvNet is not an exported graph. Allowed: torch.export.export"):
        pruner.follow(model)
    with pytest.raises(ModelError, match="graph: its 'stem.weight' is not the model's own parameter"):
        pruner.follow(copy.deepcopy(graph))
    grouped = ConvNet(lambda width: nn.GroupNorm(4, width)).train()
    normed = graph_of(grouped, prepare=False)
    with pytest.raises(ModelError, match="graph: norm .GroupNorm. normalises over channels"):
        pruner_of(grouped, sgd(grouped), IMAGES).follow(normed)


def test_quantizers_rest_and_wake_as_they_were() -> None:
    model = mlp(PREPARE["int4"])
    model.last.weight_fake_quantizer.enabled = False
    graph = graph_of(conv_net())
    before = {name: buffer.clone() for name, buffer in graph.named_buffers()}
    with resting(model), resting(graph):
        assert torch.equal(model(X), nn.Module.__call__(plain := copy.deepcopy(model), X))
        assert not any(one.enabled for one in plain.modules() if hasattr(one, "enabled"))
        assert all(not bool(one) for name, one in graph.named_buffers() if name.endswith("_enabled"))
    assert not model.last.weight_fake_quantizer.enabled
    assert model.last.activation_fake_quantizer.enabled
    assert all(torch.equal(buffer, before[name]) for name, buffer in graph.named_buffers())


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module("qat").main(11) > 0.9
    assert (tmp_path / "runs" / "qat" / "model.onnx").is_file()
