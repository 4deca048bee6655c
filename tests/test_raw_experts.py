"""Experts whose weights are raw parameters, multiplied in code: their hidden width is pruned, exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pruningawaretraining import Pruning, count_macs, load_pruned, save_pruned
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.models.calling import outputs_of
from pruningawaretraining.models.probes import perturbed

WIDTH, HIDDEN, EXPERTS = 16, 24, 4
INPUTS = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))


class Experts(nn.Module):
    """Weights of experts in one tensor each, called by a function."""

    def __init__(self, compute: Callable[[Experts, Tensor, Tensor], Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.compute = compute
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) / 4))

    def forward(self, x: Tensor, share: Tensor) -> Tensor:
        return self.compute(self, x, share)


class Mixture(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.router, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 3)
        self.experts = Experts(*KINDS[kind][:1], **KINDS[kind][1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.experts(x, self.router(x).softmax(-1)))


def plain(m: Any, x: Tensor, share: Tensor) -> Tensor:
    hidden = torch.einsum("td,edh->teh", x, m.w1).relu()
    return torch.einsum("ted,te->td", torch.einsum("teh,ehd->ted", hidden, m.w2), share)


def gated(m: Any, x: Tensor, share: Tensor) -> Tensor:
    hidden = F.silu(torch.einsum("td,edh->teh", x, m.w1)) * torch.einsum("td,edh->teh", x, m.w3)
    return (torch.einsum("teh,ehd->ted", hidden, m.w2) * share[..., None]).sum(1)


def packed(m: Any, x: Tensor, share: Tensor) -> Tensor:
    gate, up = torch.einsum("td,edh->teh", x, m.w1).chunk(2, -1)
    return (torch.einsum("teh,ehd->ted", F.silu(gate) * up, m.w2) * share[..., None]).sum(1)


def biased(m: Any, x: Tensor, share: Tensor) -> Tensor:
    hidden = F.gelu(torch.einsum("td,edh->teh", x, m.w1) + m.b1)
    return torch.einsum("ted,te->td", torch.einsum("teh,ehd->ted", hidden, m.w2) + m.b2, share)


def batched(m: Any, x: Tensor, share: Tensor) -> Tensor:
    return torch.einsum("etd,te->td", torch.bmm(torch.bmm(x.expand(EXPERTS, -1, -1), m.w1).relu(), m.w2), share)


def chosen(m: Any, x: Tensor, share: Tensor) -> Tensor:
    value, number = share.topk(2, -1)
    hidden = torch.einsum("td,tkdh->tkh", x, m.w1[number]).relu()
    return (torch.einsum("tkh,tkhd->tkd", hidden, m.w2[number]) * value[..., None]).sum(1)


def outputs_first(m: Any, x: Tensor, share: Tensor) -> Tensor:
    hidden = torch.einsum("td,ehd->teh", x, m.w1).relu()
    return torch.einsum("teh,edh,te->td", hidden, m.w2, share)


def one_by_one(m: Any, x: Tensor, share: Tensor) -> Tensor:
    return sum(share[:, e : e + 1] * ((x @ m.w1[e]).relu() @ m.w2[e]) for e in range(EXPERTS))  # type: ignore[misc]


IN, OUT = (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
KINDS: dict[str, tuple[Any, dict[str, tuple[int, ...]]]] = {
    "plain": (plain, {"w1": IN, "w2": OUT}),
    "gated": (gated, {"w1": IN, "w2": OUT, "w3": IN}),
    "packed": (packed, {"w1": (EXPERTS, WIDTH, 2 * HIDDEN), "w2": OUT}),
    "biased": (biased, {"w1": IN, "w2": OUT, "b1": (EXPERTS, HIDDEN), "b2": (EXPERTS, WIDTH)}),
    "batched": (batched, {"w1": IN, "w2": OUT}),
    "chosen": (chosen, {"w1": IN, "w2": OUT}),
    "outputs first": (outputs_first, {"w1": OUT, "w2": IN}),
    "one by one": (one_by_one, {"w1": IN, "w2": OUT}),
}


def _built(kind: str = "gated") -> nn.Module:
    torch.manual_seed(0)
    model = Mixture(kind)
    with perturbed(model):
        return copy.deepcopy(model)


def _gap(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_hidden_width_of_experts_is_pruned_exactly(kind: str, tmp_path: Path) -> None:
    model = _built(kind)
    dense, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    rule = {"target": {"sparsity": 0.5}, "scope": "local", "start": 0, "end": 0}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=INPUTS, optimizer=optimizer)
    assert {name: len(keep) for name, keep in pruner.masks.items()} == {"embed": WIDTH, "experts.w1": HIDDEN}
    grouping, cost = pruner.channel_pruner.found.grouping, pruner.channel_pruner.macs_cost
    keep_G = torch.zeros(grouping.size, dtype=torch.bool)
    keep_G[[one.start for one in grouping.sets]] = True
    assert float(cost(keep_G) / cost.dense) <= 0.02
    model(INPUTS).square().mean().backward()
    optimizer.step()
    other = torch.randn(7, 6, generator=torch.Generator().manual_seed(5))
    seen: dict[str, list[Tensor]] = {}
    pruner.before_removal = lambda: seen.update(masked=outputs_of(model, other))
    pruner.prune(model, 0)
    w1, w2 = model.experts.w1, model.experts.w2  # type: ignore[union-attr]
    assert sorted(w1.shape)[-1] == (24 if kind == "packed" else 12) and w2.numel() == 4 * 12 * 8
    assert optimizer.state[w1]["momentum_buffer"].shape == w1.shape
    assert _gap(seen["masked"], outputs_of(model, other)) <= 1e-5
    assert pruner.macs.kept == count_macs(model, INPUTS) < 0.35 * count_macs(dense, INPUTS)
    again = load_pruned(dense, save_pruned(model, tmp_path / "pruned.safetensors"))
    assert _gap(outputs_of(model, other), outputs_of(again, other)) == 0.0


def test_the_least_hidden_channels_of_all_experts_go() -> None:
    """The score is the mean over the weights of a channel of the sum of their squares."""
    model = _built()
    with torch.no_grad():
        for one in ("w1", "w3"):
            getattr(model.experts, one)[:, :, 5:11] *= 0.01
        model.experts.w2[:, 5:11] *= 0.01  # type: ignore[union-attr, index]
    rule = {"target": {"sparsity": 0.25}, "scope": "local", "start": 0, "end": 9, "schedule": "one_shot"}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=INPUTS)
    pruner.prune(model, 0)
    assert torch.nonzero(~pruner.masks["experts.w1"]).flatten().tolist() == [5, 6, 7, 8, 9, 10]
    live = [number for number in range(WIDTH) if bool(pruner.masks["embed"][number])]
    read = model.experts.w2[:, :, live]  # type: ignore[union-attr, index]
    assert not read[:, 5:11].any() and read[:, 11:].all()


@pytest.mark.parametrize("criterion", ["taylor", "geometric_median", "wanda", "random"])
def test_criteria_score_them(criterion: str) -> None:
    model = _built()
    rule = {"target": {"sparsity": 0.5}, "scope": "local", "criterion": criterion}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=INPUTS, optimizer=optimizer)
    pruner.on_epoch_begin(0)
    for _ in range(2):
        model(INPUTS).square().mean().backward()
        optimizer.step()
    pruner.prune(model, 0)
    assert model.experts.w1.shape == (EXPERTS, 8, 12)  # type: ignore[union-attr]


def test_rules_select_them_by_name_and_container() -> None:
    target = {"target": {"sparsity": 0.5}}
    for rule in ({"layers": ["embed"]}, {"exclude": ["experts"]}):
        assert set(Pruning(_built(), {"rules": [{**target, **rule}]}, example_inputs=INPUTS).masks) == {"embed"}
    only = Pruning(_built(), {"rules": [{**target, "layers": ["experts"]}]}, example_inputs=INPUTS)
    assert set(only.masks) == {"experts.w1"}
    model = _built()
    Pruning(model, {"rules": [{"sparsity_per_layer": {"experts": 0.75}}]}, example_inputs=INPUTS).prune(model, 0)
    assert model.experts.w2.shape == (EXPERTS, 6, WIDTH)  # type: ignore[union-attr]
    model = _built()
    pruner = Pruning(model, {"rules": [{**target, "start": 9}]}, example_inputs=INPUTS)
    kept = model.experts.w1[:, :, [0, 2, *range(4, HIDDEN)]].clone()  # type: ignore[union-attr, index]
    pruner.remove_channels({"experts.w1": [1, 3]})
    assert torch.equal(model.experts.w1, kept)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="layers: 'expert' is not known; did you mean 'experts'"):
        Pruning(_built(), {"rules": [{**target, "layers": ["expert"]}]}, example_inputs=INPUTS)


class Interleaved(nn.Module):
    """Gates and values in turns, which have to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.first, self.second = nn.Parameter(torch.randn(16, 48)), nn.Parameter(torch.randn(24, 16))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("td,dh->th", self.stem(x), self.first)
        return self.head(torch.einsum("th,hd->td", hidden[..., ::2] * hidden[..., 1::2], self.second))


def test_products_of_raw_parameters_that_stay_are_named(caplog: pytest.LogCaptureFixture) -> None:
    pruner = Pruning(Interleaved(), {"rules": [{"target": {"sparsity": 0.5}}]}, example_inputs=torch.randn(5, 6))
    line = Interleaved.forward.__code__.co_firstlineno + 2
    reason = pruner.channel_pruner.found.skipped["first"]
    assert reason.startswith("is cut at a place that the code states, in the model's own code (test_raw_experts.py")
    assert f"line {line})" in reason and f"first: {reason}" in caplog.text
