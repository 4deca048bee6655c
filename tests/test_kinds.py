"""Kinds of networks whose channels have to be followed exactly: pruned, masked equals removed, and how far they go."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining import Pruning, count_macs, load_pruned, save_pruned
from pruningawaretraining.errors import TargetError
from pruningawaretraining.masks.pruned_copy import pruned_copy
from pruningawaretraining.masks.temporary import temporarily_masked
from pruningawaretraining.models.calling import outputs_of
from pruningawaretraining.models.probes import perturbed

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from zoo_kinds import KINDS, build_kind

HALF = {"rules": [{"target": {"sparsity": 0.5}, "start": 0, "end": 0}]}


def floor_of(pruner: Any) -> float:
    """The smallest fraction of the MACs that is left when every set keeps one group."""
    grouping, cost = pruner.channel_pruner.found.grouping, pruner.channel_pruner.macs_cost
    keep_G = torch.zeros(grouping.size, dtype=torch.bool)
    keep_G[[one.start for one in grouping.sets]] = True
    return float(cost(keep_G) / cost.dense)


def gap(one: list[Tensor], other: list[Tensor]) -> float:
    pairs = zip(one, other, strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_pruned_exactly_and_far_enough(kind: str, tmp_path: Path) -> None:
    """At weights at which every branch counts, at another batch size and other inputs, through a file."""
    model, inputs = build_kind(kind)
    dense = copy.deepcopy(model)
    dense_macs = count_macs(model, inputs)
    with perturbed(model):
        model = copy.deepcopy(model)
    pruner = Pruning(model, HALF, example_inputs=inputs)
    assert floor_of(pruner) <= KINDS[kind][2]
    other = torch.randn(3, *inputs.shape[1:], generator=torch.Generator().manual_seed(5))
    seen: dict[str, list[Tensor]] = {}
    pruner.before_removal = lambda: seen.update(masked=outputs_of(model, other))
    pruner.prune(model, 0)
    assert pruner.channel_pruner.removed
    removed = outputs_of(model, other)
    assert gap(seen["masked"], removed) <= 1e-5
    assert pruner.macs.kept == count_macs(model, inputs) < 0.6 * dense_macs
    again = load_pruned(dense, save_pruned(model, tmp_path / "pruned.safetensors"))
    assert gap(removed, outputs_of(again, other)) == 0.0
    model.train()
    sum(one.square().mean() for one in _floats(model(other))).backward()
    assert all(one.grad is None or one.grad.shape == one.shape for one in model.parameters())


def _floats(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


@pytest.mark.parametrize(
    "kind",
    [
        "layer norm over channels by hand",
        "global response norm",
        "F.layer_norm",
        "pixel norm",
        "weight standardisation by hand",
    ],
)
def test_a_norm_by_hand_trains_masked_as_it_will_removed(kind: str) -> None:
    """Gradients of a masked model are those of the removed one, and a step later both still compute the same."""
    model, inputs = build_kind(kind)
    with perturbed(model):
        model = copy.deepcopy(model)
    twin = copy.deepcopy(model)
    rule = {"target": {"sparsity": 0.4}, "start": 0, "end": 4}
    masked = Pruning(model, {"rules": [{**rule, "schedule": "linear"}]}, example_inputs=inputs)
    masked.prune(model, 0)
    removed = Pruning(twin, {"rules": [{**rule, "schedule": "linear"}]}, example_inputs=inputs)
    removed.prune(twin, 0)
    removed.remove()
    assert masked.sparsity == removed.sparsity > 0 and twin.stem.out_channels < model.stem.out_channels
    for one in (model, twin):
        one.train()
        one(inputs).square().mean().backward()
    for name, parameter in twin.named_parameters():
        whole = dict(model.named_parameters())[name].grad
        assert whole is not None and parameter.grad is not None
        assert abs(float(whole.norm()) - float(parameter.grad.norm())) <= 1e-5 * float(parameter.grad.norm())


class Literal(nn.Module):
    """Halves of a size that the code states."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 32, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).split((16, 16), 1)
        return self.o(torch.cat([left, self.b(right)], 1))


def test_sizes_in_the_code_are_named(caplog: pytest.LogCaptureFixture) -> None:
    pruner = Pruning(Literal(), HALF, example_inputs=torch.randn(1, 3, 4, 4))
    assert set(pruner.masks) == {"b"}
    assert "a stays as it is: without some of its channels the model does not run (split_with_sizes" in caplog.text


class Mostly(nn.Module):
    """Most of its MACs are in a layer behind which a softmax is taken over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 64, 3, padding=1), nn.Conv2d(64, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.b(self.a(x)).softmax(1))


def test_the_share_of_macs_that_stays_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    Pruning(Mostly(), HALF, example_inputs=torch.randn(1, 3, 4, 4))
    said = [one.getMessage() for one in caplog.records if "of the MACs keep all their channels" in one.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(
        "layers with 94% of the MACs keep all their channels. b: reaches a softmax over channels in"
    )


class Repeated(nn.Module):
    """Blocks alike, each of which keeps its channels for one reason."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.blocks = nn.ModuleDict({f"block_{number}": Mostly() for number in range(5)})

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([one(self.first(x)[:, :3]) for one in self.blocks.values()]).sum(0)


def test_blocks_that_stay_for_one_reason_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    Pruning(Repeated(), HALF, example_inputs=torch.randn(1, 3, 4, 4))
    (said,) = [one.getMessage() for one in caplog.records if "keep all their channels" in one.getMessage()]
    assert said.count("reaches a softmax") == 1 and "blocks.block_*.b (5 layers): reaches a softmax" in said


class Softmaxed(Literal):
    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.a(x).softmax(1))


def test_a_lock_names_operation_layer_and_line() -> None:
    with pytest.raises(
        (TargetError, ValueError), match=r"a: reaches a softmax over channels in .* \(test_kinds.py, line \d+\)"
    ):
        Pruning(Softmaxed(), HALF, example_inputs=torch.randn(1, 3, 4, 4))


class Sizes(nn.Module):
    """A branch for large images alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.large, self.larger = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.o, self.never = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu()).relu()
        if x.shape[-1] > 16:
            y = y + self.larger(self.large(self.a(x)).relu())
        return self.o(y)


def test_layers_that_the_example_does_not_reach_are_looked_for_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = Sizes().eval()
    pruner = Pruning(model, HALF, example_inputs=torch.randn(1, 3, 8, 8))
    assert "never: not run on the example inputs" in caplog.text
    pruner.prune(model, 0)
    assert pruner.channel_pruner.removed and model.never.in_channels == 16
    assert model(torch.randn(1, 3, 8, 8)).shape == (1, 4, 8, 8)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 4, 32, 32)


class Flagged(nn.Module):
    """A layer runs, and only one that a flag turns on reads it; of two outputs the second may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.extra, self.idle = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)
        self.depth, self.aux, self.o = nn.Conv2d(3, 3, 1, groups=3), nn.Conv2d(16, 10, 1), nn.Conv2d(16, 4, 1)
        self.flag = False

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        extra, _ = self.extra(y).relu_(), self.depth(x)
        found = self.o(y)
        return (found + self.idle(extra) if self.flag else found), self.aux(y)


def first_of(model: nn.Module, x: Tensor) -> Any:
    return model(x)[0]


@pytest.mark.parametrize("alone", [True, False])
def test_what_only_idle_layers_or_left_out_outputs_are_made_of_keeps_its_channels(
    alone: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = Flagged().eval(), torch.randn(1, 3, 4, 4)
    pruner = Pruning(model, HALF, first_of if alone else None, example_inputs=x)
    assert set(pruner.masks) == {"a"}
    only = "depth, extra" if not alone else "aux, depth, extra"
    (line,) = [one.getMessage() for one in caplog.records if "not run on the example" in one.getMessage()]
    named = line.partition("only they can read (")[2].partition(")")[0]
    assert line.startswith("idle: ") and sorted(named.split(", ")) == only.split(", ")
    pruner.prune(model, 0)
    assert pruner.channel_pruner.removed and model.a.out_channels == 8
    model.flag = True
    found, aux = model(x)
    assert found.shape == (1, 4, 4, 4) and aux.shape == (1, 10, 4, 4)


class Routed(nn.Module):
    """A mixture of experts of which the example reaches some."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router, self.head = nn.Linear(6, 16), nn.Linear(16, 6), nn.Linear(16, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        chosen, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            if bool(mine.any()):
                out[mine] = expert(x[mine])
        return self.head(x + out)


def test_experts_that_no_token_reaches_follow_their_siblings() -> None:
    torch.manual_seed(0)
    model = Routed().eval()
    pruner = Pruning(model, HALF, example_inputs=torch.randn(1, 6))
    pruner.prune(model, 0)
    assert pruner.channel_pruner.removed
    assert {one[0].in_features for one in model.experts} == {model.embed.out_features} and model.embed.out_features < 16
    assert model(torch.randn(64, 6)).shape == (64, 3)


def test_one_channel_is_no_depthwise_convolution() -> None:
    """Grey images, and what is left of a layer of which one channel stays."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3), nn.ReLU(), nn.Conv2d(1, 8, 1), nn.Conv2d(8, 2, 1)
    )
    pruner = Pruning(model, HALF, example_inputs=torch.randn(1, 1, 8, 8))
    assert {name: len(keep) for name, keep in pruner.masks.items()} == {"0": 8, "4": 8}


@pytest.mark.parametrize(
    "kind",
    [
        "layer norm over channels by hand",
        "pixel norm",
        "weight standardisation by hand",
        "attention over positions (CBAM)",
    ],
)
def test_a_copy_is_masked_as_the_model_and_groups_that_are_left_know_where_channels_are(kind: str) -> None:
    """Averages and shapes of a family are copies; channels of an image are not in the last dimension."""
    model, inputs = build_kind(kind)
    with perturbed(model):
        model = copy.deepcopy(model)
    twin = copy.deepcopy(model)
    found = Pruning(model, HALF, example_inputs=inputs).channel_pruner.found
    assert "stem" in {one.name for one in found.grouping.sets}
    keep_G = torch.arange(found.grouping.size) % 3 > 0
    with temporarily_masked(twin, found.on(twin), keep_G):
        masked = outputs_of(twin, inputs)
    removed = pruned_copy(model, found, keep_G)
    assert gap(masked, outputs_of(removed, inputs)) <= 1e-5
    left = found.restrict(removed, keep_G)
    with temporarily_masked(removed, left, half_G := torch.arange(left.grouping.size) % 2 > 0):
        masked = outputs_of(removed, inputs)
    assert gap(masked, outputs_of(pruned_copy(removed, left, half_G), inputs)) <= 1e-5


class CrossAttention(nn.Module):
    """Learned queries attend to the inputs, without heads; the width of a query scales the products."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.latents = nn.Linear(6, 24), nn.Parameter(torch.randn(1, 4, width))
        self.q, self.k, self.v, self.o = (
            nn.Linear(width, 32), nn.Linear(24, 32), nn.Linear(24, 32), nn.Linear(32, width),
        )  # fmt: skip
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, latents = self.embed(x), self.latents.expand(len(x), -1, -1)
        query = self.q(latents)
        weights = (query @ self.k(x).transpose(1, 2) * query.shape[-1] ** -0.5).softmax(-1)
        return self.head(latents + self.o(weights @ self.v(x)))


def test_a_scale_that_is_computed_from_a_width_is_told_and_no_share_exceeds_the_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    model, inputs = CrossAttention(), torch.randn(2, 5, 6)
    config = {"rules": [{"pattern": {"type": "channel", "heads": True}, "target": {"macs": 0.5}, "start": 0, "end": 0}]}
    pruner = Pruning(model, config, example_inputs=inputs)
    reasons = [one for one in caplog.messages if one.startswith("q stays")]
    assert len(reasons) == 1 and "computes from its width, such as a scale" in reasons[0]
    macs = {"q": 2 * 4 * 32 * 32, "k": 2 * 5 * 24 * 32}
    share = round(100 * sum(macs.values()) / count_macs(model, inputs))
    told = [one for one in caplog.messages if "keep all their channels" in one]
    assert len(told) == 1 and told[0].startswith(f"layers with {share}% of the MACs")
    seen: dict[str, list[Tensor]] = {}
    pruner.before_removal = lambda: seen.update(masked=outputs_of(model, inputs))
    pruner.prune(model, 0)
    assert gap(seen["masked"], outputs_of(model, inputs)) <= 1e-5


def test_another_pruner_may_be_made_where_the_first_target_was_out_of_reach() -> None:
    model, inputs = build_kind("pixel norm")
    rule = {"start": 0, "end": 0}
    try:
        Pruning(model, {"rules": [{**rule, "target": {"macs": 1e-6}}]}, example_inputs=inputs)
    except TargetError:  # the exception holds the first one
        pruner = Pruning(model, {"rules": [{**rule, "target": {"macs": 0.5}}]}, example_inputs=inputs)
    assert pruner.prune(model, 0) == "removed"
