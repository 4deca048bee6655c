"""Layouts, input Hessians, and the layer-wise criteria on every kind of layer."""

from __future__ import annotations

import pytest
import torch
from second_order_fixture import batches, cross_entropy, layer_weights, rule, small_net
from torch import nn

from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.criteria.second_order.layer_inputs import InputHessians, reordered, unfolded
from pruningawaretraining.criteria.second_order.layout import Layout
from pruningawaretraining.criteria.second_order.untouched import untouched
from pruningawaretraining.criteria.second_order.weights import prunable_weights
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.patterns.elements import layer_weights as found_weights
from pruningawaretraining.registry import build
from pruningawaretraining.session.one_shot import one_shot

LAYERS = {
    "linear": (nn.Linear(7, 5), (3, 7)),
    "tokens": (nn.Linear(7, 5), (2, 4, 7)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8)),
    "dilated": (nn.Conv2d(4, 6, (3, 2), dilation=2, padding="same"), (2, 4, 8, 8)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 6, 6)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "one image": (nn.Conv2d(4, 6, 3), (4, 6, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_unfolded_inputs_give_the_layers_outputs(name):
    layer, shape = LAYERS[name]
    inputs = torch.randn(shape)
    seen = unfolded(layer, inputs)
    groups = seen.shape[0]
    weight = layer.weight.flatten(1).chunk(groups)
    outputs = torch.cat([seen[g] @ weight[g].T for g in range(groups)], 1) + layer.bias
    expected = layer(inputs)
    if not isinstance(layer, nn.Linear):
        expected = expected if expected.dim() == inputs.dim() and name != "one image" else expected[None]
        expected = expected.flatten(2).transpose(1, 2)
    assert torch.allclose(outputs, expected.reshape(outputs.shape), atol=1e-5)


def test_input_hessians_are_second_moments_and_leave_no_hook():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    data = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long)) for _ in range(3)]
    hooks = InputHessians([("2", model[2])], bias=True)
    Calibration(model, data, cross_entropy).run(3)
    hooks.remove()
    x = torch.relu(model[0](torch.cat([one for one, _ in data]))).detach()
    x = torch.cat([x, torch.ones(24, 1)], 1).double()
    assert torch.allclose(hooks.hessian("2")[0], 2 * x.T @ x / 24, atol=1e-5)
    assert not model[2]._forward_pre_hooks


def test_reordered_goes_from_channels_first_to_kernel_positions_first():
    inputs, kernel = 3, 4
    channel_first = torch.arange(inputs * kernel, dtype=torch.float64)
    square = torch.outer(channel_first, channel_first)[None]
    position_first = channel_first.reshape(inputs, kernel).T.reshape(-1)
    assert torch.equal(reordered(square, kernel)[0], torch.outer(position_first, position_first))


PATTERNS = ["unstructured", "2:4", "1:3", "4x1", "1x4", "2x3", "channelx1", "1xchannel"]
SHAPES = {
    "linear": nn.Linear(10, 6),
    "conv": nn.Conv2d(5, 6, 3),
    "transposed": nn.ConvTranspose2d(6, 5, 2),
    "conv1d": nn.Conv1d(4, 7, 3),
    "pointwise": nn.Conv2d(3, 9, 1),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [1, 5, 16, 50, 10_000])
@pytest.mark.parametrize("name", SHAPES)
def test_blocks_hold_every_weight_once_and_come_back(name, size, pattern):
    (weight,) = found_weights(nn.ModuleDict({"layer": SHAPES[name]}))
    layout = Layout.of(weight, build("pattern", pattern), size)
    values = torch.arange(1, weight.parameter.numel() + 1).reshape(weight.parameter.shape).float()
    blocks = layout.to_blocks(values)
    assert blocks.shape == (layout.blocks, layout.width)
    assert torch.equal(layout.from_blocks(blocks), values)
    assert torch.equal(blocks[layout.valid()].sort().values, values.flatten())
    assert not blocks[~layout.valid()].any()
    assert layout.width % layout.unit == 0


def test_unstructured_blocks_are_row_major():
    (weight,) = found_weights(nn.ModuleDict({"layer": SHAPES["conv"]}))
    layout = Layout.of(weight, build("pattern", "unstructured"), 50)
    flat = weight.parameter.detach().flatten()
    assert torch.equal(layout.to_blocks(weight.parameter.detach())[1], flat[50:100])


def test_a_tile_over_several_kernel_positions_is_refused():
    with pytest.raises(ConfigError, match="spans several kernel positions of 'layer'"):
        prunable_weights(nn.ModuleDict({"layer": SHAPES["conv"]}), build("pattern", "1x10"), 50)


def test_a_tile_too_large_for_a_block_is_refused():
    model = nn.ModuleDict({"layer": nn.Linear(100, 100)})
    with pytest.raises(ConfigError, match="a tile of 100 x 100 in 'layer' is larger"):
        prunable_weights(model, build("pattern", "channelxchannel"), 50)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 8, 2, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.up(x)).mean((2, 3)))


@pytest.mark.parametrize("criterion", ["obs", "cap", "fast_cap"])
@pytest.mark.parametrize("pattern", ["unstructured", "1:2", "4x1"])
def test_transposed_convolutions(criterion, pattern):
    model = Transposed()
    out = one_shot(model, rule(pattern, {"type": criterion, "num_grads": 16}), batches(), cross_entropy)[0.5]
    assert (out.up.weight == 0).any()
    if pattern == "4x1":  # outputs are dimension 1 here
        tiles = (out.up.weight == 0).unflatten(1, (2, 4))
        assert (tiles.all(2) | ~tiles.any(2)).all()


def test_sparse_gpt_names_layers_that_it_cannot_read():
    with pytest.raises(ConfigError, match="input Hessians are not known for 'up', a ConvTranspose2d"):
        one_shot(Transposed(), rule("unstructured", {"type": "sparse_gpt"}), batches(), cross_entropy)


def test_a_layer_that_sees_no_input_is_named():
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(192, 5), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x.flatten(1))

    with pytest.raises(ConfigError, match="the layer 'idle' saw no input"):
        one_shot(Idle(), rule("unstructured", {"type": "sparse_gpt"}), batches(), cross_entropy)
    # Its gradient is 0, so nothing is lost without it. That shows where the Fisher blocks of the other layer have full
    # rank (48 different gradients, blocks of 16): where they have not, its weights too may cost only the dampening.
    cap = {"type": "cap", "num_grads": 48, "micro_batch": 1, "fisher_block_size": 16}
    out = one_shot(Idle(), rule("unstructured", cap), batches(6, 8), cross_entropy)[0.5]
    assert (out.idle.weight == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_kept(dtype):
    model = small_net().to(dtype)
    data = [(x.to(dtype), y) for x, y in batches()]
    for criterion in ("cap", "obs", "fast_cap", "sparse_gpt"):
        out = one_shot(model, rule("unstructured", {"type": criterion, "num_grads": 8}), data, cross_entropy)[0.5]
        assert all(weight.dtype == dtype for weight in layer_weights(out).values())
        assert all(torch.isfinite(weight).all() for weight in layer_weights(out).values())


def test_a_shared_weight_is_pruned_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(192, 192)
            self.second = nn.Linear(192, 192)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x.flatten(1))))

    out = one_shot(Tied(), rule("unstructured", {"type": "cap", "num_grads": 8}), batches(2), cross_entropy)[0.5]
    assert out.second.weight is out.first.weight
    assert int((out.first.weight == 0).sum()) == out.first.weight.numel() // 2


def test_fisher_gradients_that_are_not_finite_are_refused():
    model = small_net()

    def cliff(outputs, targets):  # finite, with an infinite slope
        return (outputs * 0).sum() + torch.sqrt((outputs * 0).sum())

    with pytest.raises(ModelError, match="not finite"):
        one_shot(model, rule("unstructured", {"type": "cap", "num_grads": 4}), batches(), cliff)


def test_modes_are_restored_when_the_model_fails():
    model = small_net().train()
    with pytest.raises(RuntimeError, match="boom"), untouched(model):
        raise RuntimeError("boom")
    assert all(module.training for module in model.modules())
