"""The search for coupled channels: what it does not understand or finish is left out by name, and nothing hangs."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from pruningawaretraining import Pruning, count_macs
from pruningawaretraining.costs.macs import macs_per_layer
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.models.calling import outputs_of
from pruningawaretraining.patterns.channel import Channel, find_channels
from pruningawaretraining.patterns.channel_labels import producer_names

IMAGE = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin()


class Mixed(nn.Module):
    """A convolution, an operation on channels, and a block of two more that it does not reach."""

    def __init__(self, operation: nn.Module | None = None, channels: int = 16) -> None:
        super().__init__()
        self.first, self.operation = nn.Conv2d(3, 16, 3, padding=1), operation
        self.inside, self.last = nn.Conv2d(channels, 24, 3, padding=1), nn.Conv2d(24, 2, 1)

    def mix(self, x: Tensor) -> Tensor:
        return x if self.operation is None else self.operation(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inside(self.mix(self.first(x))).relu())


class Flipped(Mixed):
    def mix(self, x: Tensor) -> Tensor:
        return x.flip(1)


class Shuffled(Mixed):
    def mix(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)


class Rolled(Mixed):
    def mix(self, x: Tensor) -> Tensor:
        return x.roll(3, 1)


class Sliced(Mixed):
    def mix(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, 8:], x[:, :8]], 1)


class ByIndex(Mixed):
    def mix(self, x: Tensor) -> Tensor:
        return x[:, torch.arange(15, -1, -1)]


class Mirrored(Mixed):
    def mix(self, x: Tensor) -> Tensor:
        return x + x.flip(1)


class SplitWidth(Mixed):
    def mix(self, x: Tensor) -> Tensor:
        a, b = x.split(8, 1)
        return torch.cat([b, a], 1)


CASES = {
    "flip": Flipped(),
    "shuffle by reshapes": Shuffled(),
    "channel_shuffle": Mixed(nn.ChannelShuffle(4)),
    "pixel_shuffle": Mixed(nn.PixelShuffle(2), 4),
    "pixel_unshuffle": Mixed(nn.PixelUnshuffle(2), 64),
    "glu": Mixed(nn.GLU(1), 8),
    "roll": Rolled(),
    "slices put together": Sliced(),
    "index": ByIndex(),
    "mirrored": Mirrored(),
    "split with a constant": SplitWidth(),
    "instance norm": Mixed(nn.InstanceNorm2d(16, affine=True, track_running_stats=True)),
    "grouped transposed": Mixed(nn.ConvTranspose2d(16, 16, 3, padding=1, groups=4)),
    "unfold": Mixed(nn.Sequential(nn.Unfold(2, stride=2), nn.Unflatten(2, (16, 16))), 64),
    "softmax over channels": Mixed(nn.Softmax(1)),
    "weight_norm": Mixed(nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 1))),
}


@pytest.mark.parametrize("name", CASES)
def test_an_operation_on_channels_is_handled_or_left_out(name: str) -> None:
    """Half of all that may go is removed; the model computes what it did masked, and its last block is pruned."""
    torch.manual_seed(0)
    model = CASES[name].eval()
    rule = {"target": {"sparsity": 0.5}, "scope": "local", "start": 0, "end": 1}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=IMAGE)
    pruner.prune(epoch=0)
    masked = outputs_of(model, IMAGE)[0]
    pruner.remove()
    removed = outputs_of(model, IMAGE)[0]
    assert float((masked - removed).abs().max()) <= 1e-5 * float(masked.abs().max())
    assert model.inside.out_channels == 18
    assert round(pruner.channel_pruner.macs_cost(pruner.channel_pruner.keep_D)) == count_macs(model, IMAGE)
    assert model.first.out_channels < 16 or "first" in pruner.channel_pruner.found.skipped


class Stacked(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.before, self.rnn, self.after = nn.Linear(6, 12), kind(12, 8, batch_first=True), nn.Linear(8, 10)
        self.last = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.after(self.rnn(self.before(x))[0]).relu())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_lose_states(kind: type[nn.RNNBase]) -> None:
    model, inputs = Stacked(kind).eval(), torch.randn(2, 5, 6)
    pruner = Pruning(model, {"rules": [{"target": {"sparsity": 0.5}, "scope": "local"}]}, example_inputs=inputs)
    pruner.prune(epoch=0)
    assert (model.rnn.input_size, model.rnn.hidden_size, model.after.out_features) == (6, 4, 5)
    assert model.rnn.weight_hh_l0.shape[1] == 4 and model(torch.randn(3, 7, 6)).shape == (3, 7, 2)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("zeros", [True, False])
def test_recurrent_cells_lose_states(kind: type[nn.RNNCellBase], zeros: bool) -> None:
    class Stepped(Stacked):
        def forward(self, x: Tensor) -> Tensor:
            states = x.new_zeros(x.shape[0], self.rnn.hidden_size) if zeros else None
            states = (states, states) if zeros and isinstance(self.rnn, nn.LSTMCell) else states
            for step in self.before(x).unbind(1):
                states = self.rnn(step, states)
            return self.last(self.after(states[0] if isinstance(states, tuple) else states).relu())

    def made(width: int, states: int, **_: Any) -> nn.RNNCellBase:
        return kind(width, states)

    model, inputs = Stepped(made).eval(), torch.randn(2, 5, 6)
    pruner = Pruning(model, {"rules": [{"target": {"sparsity": 0.5}, "scope": "local"}]}, example_inputs=inputs)
    pruner.prune(epoch=0)
    assert (model.rnn.input_size, model.rnn.hidden_size, model.after.out_features) == (6, 4, 5)
    assert model.rnn.weight_hh.shape[1] == 4 and model(torch.randn(3, 7, 6)).shape == (3, 2)


class Products(nn.Module):
    """Channels along two dimensions of raw parameters, beside those of a layer: costs count two alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 5)
        self.first, self.second = nn.Parameter(torch.randn(16, 4, 24)), nn.Parameter(torch.randn(4, 24, 16))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bd,dnh->bnh", self.stem(x), self.first).relu()
        return self.head(torch.einsum("bnh,nhd->bd", hidden, self.second))


def test_products_of_raw_parameters_that_stay_are_named(caplog: pytest.LogCaptureFixture) -> None:
    pruner = Pruning(Products(), {"rules": [{"target": {"sparsity": 0.5}}]}, example_inputs=torch.randn(6, 8))
    reason = pruner.channel_pruner.found.skipped["first"]
    line = Products.forward.__code__.co_firstlineno + 2
    assert "only raw parameters hold its channels (dimension 2 of first, dimension 1 of second)" in reason
    assert f"in the model's own code (test_tracing.py, line {line})" in reason
    assert f"first: {reason}" in caplog.text
    assert [one["source"] for one in pruner.describe_sets()] == ["stem"]


class Windows(nn.Module):
    """An attention whose output projection has a name that is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.last, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.head(x + self.last(y.transpose(1, 2).reshape(x.shape)))


def test_heads_are_advised_only_where_they_are_known() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 16), Windows())
    pruner = Pruning(model, {"rules": [{"target": {"sparsity": 0.5}}]}, example_inputs=torch.randn(2, 5, 6))
    reason = pruner.channel_pruner.found.skipped["2.qkv"]
    assert "(its heads are not known either: it has no output projection that is known by its name)" in reason
    assert "prune it by heads" not in reason


class NonLocal(nn.Module):
    """Attention over positions whose views state the width by an attribute, as it is often copied."""

    def __init__(self) -> None:
        super().__init__()
        self.inter_channels, self.stem = 8, nn.Conv2d(3, 16, 3, padding=1)
        self.theta, self.phi, self.g = (nn.Conv2d(16, 8, 1) for _ in range(3))
        self.w, self.head = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        theta, phi, g = (one(x).view(len(x), self.inter_channels, -1) for one in (self.theta, self.phi, self.g))
        y = (theta.transpose(1, 2) @ phi).softmax(-1) @ g.transpose(1, 2)
        y = y.transpose(1, 2).reshape(len(x), self.inter_channels, *x.shape[2:])
        return self.head(x + self.w(y))


def test_an_attribute_that_views_state_widths_with_follows() -> None:
    torch.manual_seed(0)
    model, inputs = NonLocal().eval(), torch.randn(2, 3, 8, 8)
    pruner = Pruning(
        model, {"rules": [{"target": {"sparsity": 0.5}, "scope": "local", "end": 1}]}, example_inputs=inputs
    )
    assert {one["source"]: one["size"] for one in pruner.describe_sets()} == {"stem": 16, "theta": 8}
    pruner.prune(model, 0)
    masked = model(inputs)
    pruner.remove()
    assert (model.inter_channels, model.g.out_channels, model.theta.out_channels) == (6, 6, 6)
    assert torch.allclose(model(inputs), masked, atol=1e-5)


def test_a_search_that_takes_too_long_leaves_the_rest_out_by_name() -> None:
    model = torchvision.models.densenet121().eval()
    with pytest.raises(ModelError, match=r"not done within 1e-09 s \(trace_limit\)"):
        find_channels(model, IMAGE, set(producer_names(model)), limit=1e-9)
    begun = time.monotonic()
    find_channels(model, IMAGE, set(producer_names(model)))
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("limit", [0, -1, "long"])
def test_a_limit_that_is_none_is_refused(limit: object) -> None:
    with pytest.raises(ConfigError, match="trace_limit"):
        Pruning(Mixed(), {"rules": [{"target": {"sparsity": 0.5}}], "trace_limit": limit}, example_inputs=IMAGE)


def test_groups_of_a_model_without_storage() -> None:
    """A decoder of half a billion parameters on the meta device: its groups are found, and nothing is allocated."""
    transformers = pytest.importorskip("transformers", "5")  # 4 calls autocast, which the meta device has not
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=32,
        num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
        inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 1, 4, 4)}
    found = Channel(heads=True).build(model, inputs)
    sizes = {one.name: one.size for one in found.grouping.sets}
    assert sizes["model.layers.0.mlp.gate_proj"] == 5632 and sizes["model.layers.7.self_attn"] == 4
    assert all(parameter.is_meta for parameter in model.parameters())
    rule = {"pattern": {"type": "channel", "heads": True}, "target": {"macs": 0.5}}
    assert Pruning(model, {"rules": [rule]}, example_inputs=inputs).macs.dense > 1e9


def test_macs_are_counted_by_module_whatever_calls_them() -> None:
    model = Mixed()
    whole = macs_per_layer(model, IMAGE)
    parts = macs_per_layer(model, IMAGE, lambda model, x: model.inside(model.first(x)))
    assert whole["first"] == parts["first"] == 2 * 32 * 32 * 3 * 16 * 9
    assert whole["inside"] == parts["inside"] == parts[""] - parts["first"]
    assert parts["last"] == 0 and whole["last"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t", "maxvit_t", "shufflenet_v2_x0_5"])
def test_models_that_hang_elsewhere_are_done_soon(name: str) -> None:
    size = 224 if name == "maxvit_t" else 64
    model = torchvision.models.get_model(name, weights=None).eval()
    begun = time.monotonic()
    pruner = Pruning(model, {"rules": [{"target": {"sparsity": 0.3}}]}, example_inputs=torch.randn(1, 3, size, size))
    pruner.prune(epoch=0)
    assert pruner.phase == "finetune" and time.monotonic() - begun < 60
