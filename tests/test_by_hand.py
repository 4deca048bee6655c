"""Fractions of single layers, and channels chosen by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining import Pruning
from pruningawaretraining.allocation.ranking import Allocator, Limits
from pruningawaretraining.allocation.threshold import allocate
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.groups.grouping import Grouping, GroupSet

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.second(self.first(x).relu())
        return self.head(self.grouped(x).relu().mean((2, 3)))


def net() -> Residual:
    torch.manual_seed(0)
    return Residual()


def pruner_of(model: nn.Module, **rule: Any) -> Pruning:
    return Pruning(model, {"rules": [rule]}, example_inputs=EXAMPLE)


def test_limits_of_single_sets_are_exact() -> None:
    sets = (GroupSet("a", 0, 4), GroupSet("b", 4, 8))
    limits = Limits(per_set=((0.5, 0.5), (0.0, 0.0)))
    scores = torch.tensor([4.0, 1, 2, 3, 0, 0, 0, 0])
    expected = [1, 0, 0, 1, 1, 1, 1, 1]
    assert Allocator(Grouping("g", (), sets), scores, limits).at(0.0).int().tolist() == expected
    assert allocate(scores, [4, 4], 0.0, limits).int().tolist() == expected


def test_channels_by_a_fraction_of_each_layer_on_a_schedule() -> None:
    model = net()
    pruner = pruner_of(model, sparsity_per_layer={"first": 0.5, "stem": 0.25}, end=1)
    widths = []
    for epoch in range(2):
        pruner.prune(model, epoch)
        widths.append([int(keep.sum()) for keep in pruner.masks.values()])
    assert (
        widths[0] == [7 if name == "stem" else 9 for name in pruner.masks if name != "grouped"]
        or widths[0] != widths[1]
    )
    assert model.first.out_channels == 6 and model.stem.out_channels == model.second.out_channels == 6
    assert pruner.phase == "finetune" and model(EXAMPLE).shape == (2, 4)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
def test_weights_by_a_fraction_of_each_layer(pattern: str) -> None:
    model = net()
    pruner = pruner_of(model, pattern=pattern, sparsity_per_layer={"first": 0.5, "re:sec.*": 0.25})
    assert pruner.prune(model, 0) == "masked"
    zeros = {name: float((one == 0).float().mean()) for name, one in model.named_parameters() if one.dim() == 4}
    assert zeros == {"stem.weight": 0.0, "first.weight": 0.5, "second.weight": 0.25, "grouped.weight": 0.0}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"sparsity_per_layer": {"frist": 0.5}}, r"sparsity_per_layer: 'frist' is not known; did you mean 'first'"),
        ({"sparsity_per_layer": {"first": 1.5}}, r"sparsity_per_layer.first: 1.5"),
        ({"sparsity_per_layer": {}}, r"sparsity_per_layer: \{\} names no layer"),
        ({"sparsity_per_layer": {"first": 0.5}, "target": {"macs": 0.5}}, "leave out target.macs"),
        ({"sparsity_per_layer": {"stem": 0.5, "second": 0.25}}, "'second' and 'stem' are coupled by 'stem'"),
        ({"sparsity_per_layer": {"head": 0.5}}, "sparsity_per_layer: 'head' is not known"),
        (
            {"sparsity_per_layer": {"first": 0.5}, "max_sparsity": 0.25},
            r"first: 0.5 does not go with max_sparsity: 0.25",
        ),
        (
            {"sparsity_per_layer": {"re:(first|second)": 0.5}, "max_sparsity_from": {"first": 0.25}},
            r"rules\[0\].sparsity_per_layer: 0.5 of 'first' does not go with max_sparsity_from: 0.25",
        ),
        (
            {"keep_per_layer": 6, "max_sparsity_from": {"first": 0.25}},
            r"rules\[0\].keep_per_layer: 6 of 'first', without 0.5 of it, does not go with max_sparsity_from: 0.25",
        ),
        ({"sparsity_per_layer": {"first": 0.1}, "min_sparsity": 0.2}, r"first: 0.1 does not go with min_sparsity: 0.2"),
    ],
)
def test_what_is_refused(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pruner_of(net(), **rule)


def test_fractions_within_the_caps_of_a_file_hold() -> None:
    model = net()
    rule = {"sparsity_per_layer": {"first": 0.25}, "max_sparsity_from": {"first": 0.25, "stem": 0.0}}
    pruner_of(model, **rule).prune(model, 0)
    assert (model.first.out_channels, model.stem.out_channels) == (9, 8)


def test_channels_chosen_by_hand_are_removed_with_what_is_coupled() -> None:
    model = net()
    kept = [0, 2, 4, 5, 6, 7, 8, 10, 11]
    expected = model.first.weight[kept].clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(EXAMPLE).sum().backward()
    optimizer.step()
    expected = model.first.weight.detach()[kept].clone()
    pruner = Pruning(model, {"rules": [{"target": {"sparsity": 0.5}, "start": 9}]}, example_inputs=EXAMPLE)
    pruner.attach(optimizer)
    pruner.remove_channels({"first": [1, 3, 9]})
    assert torch.equal(model.first.weight, expected) and model.second.in_channels == 9
    assert optimizer.state[model.first.weight]["momentum_buffer"].shape == model.first.weight.shape
    pruner.remove_channels({"first": [0]})
    assert torch.equal(model.first.weight, expected[1:])


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ({"frist": [0]}, "channels: 'frist' is not known; did you mean 'first'"),
        ({"first": [12]}, "channels.first: 12 is not allowed. Allowed: 0 to 11"),
        ({"first": list(range(12))}, "0 would be left of 'first'. Allowed: at least 1"),
        ({"head": [0]}, "channels: 'head' stays: "),
        ({"grouped": [0]}, r"channels.grouped: \[0\] go only together with"),
    ],
)
def test_channels_that_cannot_go_are_named_and_nothing_changes(channels: Any, message: str) -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruner = pruner_of(model, target={"sparsity": 0.5})
    with pytest.raises(ConfigError, match=message):
        pruner.remove_channels(channels)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert pruner.sparsity == 0


@pytest.mark.parametrize(("pattern", "kept"), [("channel", {"first": 5, "stem": 4, "grouped": 4}), ("4x1", None)])
def test_so_many_stay_in_each_layer(pattern: str, kept: dict[str, int] | None) -> None:
    model = net()
    pruner = pruner_of(model, pattern=pattern, keep_per_layer=5)
    pruner.prune(model, 0)
    left = {name: int(keep.sum()) for name, keep in pruner.masks.items()}
    assert left == (kept or dict.fromkeys(left, 5))  # sets of fewer groups stay whole


def test_fractions_and_counts_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="sparsity_per_layer: it stands for a target. Allowed: leave out keep_per_"):
        pruner_of(net(), keep_per_layer=5, sparsity_per_layer={"first": 0.5})
    with pytest.raises(ConfigError, match="keep_per_layer: it stands for a target. Allowed: leave out target.sparsity"):
        pruner_of(net(), keep_per_layer=5, target={"sparsity": 0.5})


@pytest.mark.parametrize(
    "numbers",
    [np.array([1, 3]), [np.int64(1), np.int32(3)], torch.tensor([1, 3]), (1, torch.tensor(3)), range(1, 4, 2)],
)
def test_numbers_of_channels_may_come_from_anywhere(numbers: Any) -> None:
    model = net()
    expected = model.first.weight.detach()[[0, 2, *range(4, 12)]]
    pruner_of(model, target={"sparsity": 0.5}, start=9).remove_channels({"first": numbers})
    assert torch.equal(model.first.weight, expected)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (1, r"channels.first: 1 is not allowed. Allowed: a list of numbers, 0 to 11"),
        ("01", r"channels.first: '01' is not allowed. Allowed: a list of numbers"),
        (torch.tensor(1), r"channels.first: tensor\(1\) is not allowed"),
        (torch.ones(12, dtype=torch.bool), r"channels.first: True is not allowed. Allowed: 0 to 11"),
        ([1.0], r"channels.first: 1.0 is not allowed. Allowed: 0 to 11"),
    ],
)
def test_what_is_no_number_of_a_channel_is_refused(numbers: Any, message: str) -> None:
    model = net()
    with pytest.raises(ConfigError, match=message):
        pruner_of(model, target={"sparsity": 0.5}, start=9).remove_channels({"first": numbers})
    assert model.first.out_channels == 12


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.before, self.rnn, self.after = nn.Linear(6, 12), kind(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, states = self.before(x).relu(), None
        if isinstance(self.rnn, nn.RNNBase):
            return self.after(self.rnn(x)[0])
        for step in x:
            states = self.rnn(step, states)
        return self.after(states[0] if isinstance(states, tuple) else states)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_layers_have_one_name_everywhere(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 6)
    model = Recurrent(kind)
    Pruning(model, {"rules": [{"sparsity_per_layer": {"rnn": 0.5}}]}, example_inputs=x).prune()
    assert (model.rnn.input_size, model.rnn.hidden_size, model.after.in_features) == (12, 4, 4)
    model = Recurrent(kind)
    pruner = Pruning(model, {"rules": [{"target": {"sparsity": 0.5}, "start": 9}]}, example_inputs=x)
    dense = model.after.weight.detach().clone()
    pruner.remove_channels({"rnn": [0, 3]})
    assert model.rnn.hidden_size == 6 and torch.equal(model.after.weight, dense[:, [1, 2, 4, 5, 6, 7]])
    pruner.remove_channels({"before": [5]})
    assert model.rnn.input_size == 11 and model(x).shape[-1] == 3
