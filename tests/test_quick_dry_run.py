"""The dry run copies weights once, puts back what it masks, and does not run a model once for every block in it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from pruningawaretraining import Pruning, count_macs
from pruningawaretraining.masks import agreed_groups, dry_run
from pruningawaretraining.masks.confined import rounds_of
from pruningawaretraining.masks.dry_run import removable_channels
from pruningawaretraining.models.comparison import Comparison, NoFloat64
from pruningawaretraining.models.surgery import slice_tensor
from pruningawaretraining.patterns.channel import Channel, find_channels


class StatedHeads(nn.Module):
    """Attention whose code takes the width of a head from its input: it cannot lose heads."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts.unbind(0))
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Deep(nn.Module):
    """Residual blocks of such attention and an MLP; counts its forward passes."""

    def __init__(self, depth: int, width: int = 16) -> None:
        super().__init__()
        self.passes = 0
        self.embed, self.head = nn.Linear(6, width), nn.Linear(width, 3)
        self.attention = nn.ModuleList(StatedHeads(width) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width)) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        x = self.embed(x)
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x = x + attention(x)
            x = x + mlp(x)
        return self.head(x)


def found_in(model: nn.Module, inputs: Any, heads: bool = True) -> Any:
    pattern = Channel(heads=heads)
    chosen = pattern.chosen(model, None, ["embed"])
    return removable_channels(model, inputs, chosen, units=pattern.head_units(model, chosen))


def test_blocks_that_fail_by_themselves_are_found_in_one_pass() -> None:
    passes = []
    for depth in (2, 7):
        torch.manual_seed(0)
        model = Deep(depth)
        found = found_in(model, torch.randn(2, 5, 6))
        assert {one.name for one in found.grouping.sets} == {f"mlp.{number}.0" for number in range(depth)}
        assert all("does not run" in found.skipped[f"attention.{number}"] for number in range(depth))
        passes.append(model.passes)
    assert passes[0] == passes[1] <= 10


class Pair(nn.Module):
    """Two sets of channels that lie in one module, each of which has no other tensors."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 8), nn.Linear(8, width)
        self.c, self.d = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x).relu()) + self.d(self.c(x).relu())


def test_sets_of_the_same_module_are_tried_one_after_the_other() -> None:
    model = nn.Sequential(nn.Linear(6, 16), Pair(), Pair(), nn.Linear(16, 3))
    grouping = find_channels(model, torch.randn(2, 5, 6), Channel().chosen(model, None)).grouping
    rounds = [{owner: grouping.sets[number].name for owner, number in one.items()} for one in rounds_of(grouping)]
    assert rounds == [{"1": "1.a", "2": "2.a"}, {"1": "1.c", "2": "2.c"}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [*zoo.SMALL, "heads"])
def test_the_dry_run_leaves_every_value_as_it_was(name: str, dtype: torch.dtype) -> None:
    model, inputs = zoo.architecture(name) if name in zoo.SMALL else (Deep(1), torch.randn(2, 5, 6))
    model = model.to(dtype)
    before = copy.deepcopy(model.state_dict())
    pointers = [one.data_ptr() for one in model.parameters()]
    removable_channels(model, inputs.to(dtype), Channel().chosen(model, None))
    assert all(torch.equal(one, before[key]) for key, one in model.state_dict().items())
    assert [one.data_ptr() for one in model.parameters()] == pointers
    assert all(one.dtype is dtype for one in model.parameters())


def test_weights_are_in_float64_once_for_all_outputs_in_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = Deep(1), torch.randn(2, 5, 6)
    comparison = Comparison(model, inputs)
    with comparison.in_float64():
        inside = [id(one) for one in model.parameters()]
        assert all(one.dtype is torch.float64 for one in model.parameters())
        one, other = comparison.outputs(), comparison.outputs()
        assert one.exact and torch.equal(one.tensors[0], other.tensors[0])
        assert [id(weight) for weight in model.parameters()] == inside
    assert all(weight.dtype is torch.float32 for weight in model.parameters())
    assert torch.equal(comparison.outputs().tensors[0], one.tensors[0])


class Fixed(nn.Linear):
    """Code that fixes its dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def test_what_does_not_run_in_float64_is_said_and_compared_in_its_own_dtype() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Fixed(8, 3))
    comparison = Comparison(model, torch.randn(2, 6))
    with pytest.raises(NoFloat64), comparison.in_float64():
        comparison.outputs()
    assert not comparison.outputs().exact
    with pytest.raises(NoFloat64), comparison.in_float64():
        pass
    found = removable_channels(model, torch.randn(2, 6), {"0"})
    assert [one.name for one in found.grouping.sets] == ["0"]


@pytest.mark.parametrize("chosen", [[0, 1, 2], [2, 3], [4], [0, 1, 2, 3, 4], [0, 2, 4], [1, 4]], ids=str)
@pytest.mark.parametrize("memory", ["contiguous", "channels last", "turned"])
def test_a_slice_has_memory_of_its_own(chosen: list[int], memory: str) -> None:
    tensor = torch.randn(5, 5, 2, 3)
    if memory == "channels last":
        tensor = tensor.to(memory_format=torch.channels_last)
    if memory == "turned":
        tensor = torch.randn(5, 5).t()
    for keep in ({0: chosen}, {1: chosen}, {0: [0, 2, 3], 1: chosen}, {0: [1, 2], 1: chosen}):
        made = slice_tensor(tensor, {dim: torch.tensor(indices) for dim, indices in keep.items()})
        expected = tensor
        for dim, indices in keep.items():
            expected = expected.index_select(dim, torch.tensor(indices))
        assert torch.equal(made, expected)
        assert made.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
        assert made.untyped_storage().nbytes() == 4 * made.numel()
        assert made.is_contiguous(
            memory_format=torch.channels_last if memory == "channels last" else torch.contiguous_format
        )


class Tokens(nn.Module):
    """A learnable token, as a view of the parameter, is what a module is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.mix, self.head = nn.Parameter(torch.randn(1, 1, 6)), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.mix(self.token.expand(len(x), -1, -1)) + self.mix(x)).relu())


def test_a_module_that_is_called_with_a_view_of_a_parameter_is_counted() -> None:
    model, inputs = Tokens(), torch.randn(2, 5, 6)
    assert count_macs(model, inputs) == 2 * 6 * 8 + 10 * 6 * 8 + 10 * 8 * 3
    pruner = Pruning(model, {"rules": [{"target": {"macs": 0.5}, "start": 0, "end": 0}]}, example_inputs=inputs)
    pruner.prune(model, 0)
    assert pruner.macs.kept == count_macs(model, inputs)


@pytest.mark.parametrize(("mine", "first"), [({"0", "2"}, {"0"}), ({"0"}, {"0", "2"})], ids=["later", "first"])
def test_processes_prune_what_the_first_has_found_within_its_limit(
    mine: set[str], first: set[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Clocks differ: a process that has found more leaves the rest out; the others search without a limit."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    names = [name for name, one in model.named_modules() if isinstance(one, nn.Linear)]
    limits = []

    def find(
        model: nn.Module, inputs: Any, chosen: set[str], forward_fn: Any, units: Any, limit: float, *_: Any
    ) -> Any:
        limits.append(limit)
        return find_channels(model, inputs, mine if limit < 1e9 else {"0", "2"})

    monkeypatch.setattr(dry_run, "find_channels", find)
    monkeypatch.setattr(agreed_groups, "world_size", lambda: 2)
    monkeypatch.setattr(agreed_groups, "rank", lambda: 1)
    monkeypatch.setattr(agreed_groups, "agreed", lambda _: [torch.tensor([name in first for name in names])])
    found = removable_channels(model, torch.randn(2, 6), set(names), limit=5.0)
    assert limits == [float("inf")]
    assert {one.name for one in found.grouping.sets} == first
    assert ("did not find its coupled channels" in found.skipped.get("2", "")) is (first == {"0"})
