"""What a trace cannot see: sets whose channels cannot go are found before training and left out, with the reason."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Pruning
from pruningawaretraining.errors import ModelError
from pruningawaretraining.masks import agreed_groups, dry_run
from pruningawaretraining.masks.culprits import failing_module
from pruningawaretraining.patterns.channel_groups import ChannelGroups

CONFIG = {"rules": [{"target": {"sparsity": 0.5}, "start": 0, "end": 0}]}


class Residual(nn.Module):
    """The model's input is added to one layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.f = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x + self.b(torch.relu(self.a(x))))


class Constant(Residual):
    """A tensor is multiplied in that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.rand(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.b(torch.relu(self.a(x))) * self.scale)


class Attention(nn.Module):
    """The width of heads comes from the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 16), nn.LayerNorm(16)
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down, self.head = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, length, width = x.shape
        split = self.qkv(self.norm(x)).split(width, 2)
        q, k, v = (part.view(batch, length, 4, width // 4).transpose(1, 2) for part in split)
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.o(y)
        return self.head((x + self.down(functional.gelu(self.up(x)))).mean(1))


class RootMeanSquare(nn.Module):
    """RMSNorm on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 8), nn.RMSNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.down(functional.silu(self.up(self.norm(x)))))


CASES: dict[str, tuple[type[nn.Module], tuple[int, ...], set[str], set[str]]] = {  # left out, pruned
    "input": (Residual, (2, 8), {"b"}, {"a"}),
    "constant": (Constant, (2, 8), {"b"}, {"a"}),
    "attention": (Attention, (2, 6, 5), {"embed"}, {"up"}),
    "RMSNorm": (RootMeanSquare, (2, 5), set(), {"embed", "up"}),
}

WHY = {
    "input": "meets an input of the model",
    "constant": "meets a tensor that is no parameter or buffer of any module",
    "attention": "without some of its channels the model does not run (",
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_go_stays_and_the_rest_goes(case: str, caplog: pytest.LogCaptureFixture) -> None:
    kind, shape, stay, go = CASES[case]
    torch.manual_seed(0)
    model, inputs = kind(), torch.randn(shape)
    before = copy.deepcopy(model.state_dict())
    expected = model(inputs)
    with caplog.at_level(logging.INFO, logger="pruningawaretraining"):
        pruner = Pruning(model, CONFIG, example_inputs=inputs)
    assert torch.equal(model(inputs), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(pruner.masks) == go
    for name in stay:
        assert f"{name} stays as it is: {WHY[case]}" in caplog.text
    pruner.prune(model, 0)
    widths = {name: module.out_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert all(widths[name] == len(before[f"{name}.weight"]) // 2 for name in go)
    assert all(widths[name] == len(before[f"{name}.weight"]) for name in stay)
    assert model(inputs).shape == expected.shape


def test_a_model_in_which_nothing_can_go_is_refused_at_once() -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.f = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.f(x + self.a(x))

    model = Only()
    with pytest.raises(ModelError, match="Only has no prunable channel group .*a: meets an input of the model"):
        Pruning(model, CONFIG, example_inputs=torch.randn(2, 8))
    assert model.a.weight.shape == (8, 8)


class Auxiliary(nn.Module):
    """A head that only training runs reads the trunk's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.norm = nn.Linear(6, 16), nn.BatchNorm1d(16)
        self.main = nn.Linear(16, 3)
        self.side = nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = torch.relu(self.norm(self.trunk(x)))
        return (self.main(x), self.side(x)) if self.training else self.main(x)


def test_heads_that_only_training_runs_follow() -> None:
    model, inputs = Auxiliary(), torch.randn(4, 6)
    state = torch.get_rng_state()
    pruner = Pruning(model, CONFIG, example_inputs=inputs)
    assert torch.equal(torch.get_rng_state(), state) and model.norm.num_batches_tracked == 0
    assert set(pruner.masks) == {"trunk", "side.1"}
    pruner.prune(model, 0)
    assert (model.trunk.out_features, model.side[1].in_features, model.side[1].out_features) == (8, 8, 4)
    model.train()
    sum(out.sum() for out in model(inputs)).backward()
    assert model.side[1].weight.grad is not None


@pytest.mark.parametrize("number", [0, 1])
def test_processes_leave_out_what_the_first_did_not_find_in_time(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first has a limit and finds "trunk" alone; the others have none, and follow it."""
    model, inputs, limits = Auxiliary(), torch.randn(4, 6), []
    found = dry_run.find_channels
    sent = torch.tensor([name == "trunk" for name in agreed_groups.producer_names(model)])

    def agreed(mine: Tensor) -> tuple[Tensor]:
        return (mine if number == 0 else sent,)

    def found_by(*args: object) -> ChannelGroups:
        limits.append(args[5])
        groups = found(*args[:5], 60.0, *args[6:])
        return groups if number else groups.without({1: "too late"})

    monkeypatch.setattr(agreed_groups, "world_size", lambda: 2)
    monkeypatch.setattr(agreed_groups, "rank", lambda: number)
    monkeypatch.setattr(agreed_groups, "agreed", agreed)
    monkeypatch.setattr(dry_run, "find_channels", found_by)
    pruner = Pruning(model, {**CONFIG, "trace_limit": 5}, example_inputs=inputs)
    assert set(pruner.masks) == {"trunk"}
    assert limits == [5.0 if number == 0 else math.inf]
    assert "side.1" in pruner.channel_pruner.found.skipped


class Stated(nn.Module):
    """Three blocks whose code states the width of one layer each; all others are free."""

    def __init__(self, values: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 12)
        self.blocks = nn.ModuleList(StatedBlock(values) for _ in range(3))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class StatedBlock(nn.Module):
    def __init__(self, values: bool) -> None:
        super().__init__()
        self.inner, self.up, self.down = nn.Linear(12, 12), nn.Linear(12, 24), nn.Linear(24, 12)
        self.values = values

    def forward(self, x: Tensor) -> Tensor:
        if self.values and bool((x > 1e6).any()):
            return x
        y = self.inner(x).relu().view(len(x), 12)
        return self.down(self.up(y).relu())


@pytest.mark.parametrize("values", [False, True], ids=["by shapes", "code looks at values"])
def test_sets_that_fail_alone_are_found_where_the_model_fails(values: bool) -> None:
    """Whether the model runs on the meta device or not."""
    model = Stated(values)
    before = copy.deepcopy(model.state_dict())
    found = dry_run.find_channels(model, torch.randn(2, 5), set(agreed_groups.producer_names(model)))
    rehearsal = dry_run._Rehearsal(model, found, torch.randn(2, 5), None, {})
    names = [one.name for one in found.grouping.sets]
    left = [names[number] for number in rehearsal.able()]
    assert left == [name for name in names if not name.endswith(".inner")] and len(left) == len(names) - 3 > 3
    assert {names[number] for number in rehearsal.reasons} == {f"blocks.{number}.inner" for number in range(3)}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_module_that_fails_is_the_innermost_of_the_model() -> None:
    model = Stated()
    model.blocks[1].up = nn.Linear(7, 24)
    with pytest.raises(RuntimeError) as caught:
        model(torch.randn(2, 5))
    assert failing_module(caught.value, model) == "blocks.1.up"
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2) + torch.zeros(3)
    assert failing_module(caught.value, model) is None
