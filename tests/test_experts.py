"""Experts: masked they are as if removed, and what depends on them follows.

Shape suffixes: ``_E`` experts of a block, ``_T`` tokens, ``_G`` groups.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import law_checks
import moe
import pytest
import torch
from moe import EXPERTS, TOP_K, LooseBlock, MoeBlock, built
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Pruning, load_pruned, one_shot, save_pruned
from pruningawaretraining.costs.macs import count_macs
from pruningawaretraining.errors import CheckpointError, ConfigError, ModelError, TargetError
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.patterns.expert import Expert, expert_blocks
from pruningawaretraining.registry import names

KINDS = pytest.mark.parametrize("kind", [MoeBlock, LooseBlock])


def pruner_of(model: nn.Module, x: Tensor, optimizer: Any = None, **rule: Any) -> Pruning:
    rule = {"pattern": "expert", "target": {"sparsity": 0.5}, **rule}
    return Pruning(model, {"rules": [rule]}, example_inputs=x, optimizer=optimizer)


def masked(model: nn.Module, x: Tensor, **rule: Any) -> Pruning:
    """A pruner after the second of its three events: experts are masked, and nothing is removed yet."""
    pruner = pruner_of(model, x, start=0, end=2, schedule="linear", target={"sparsity": 0.7}, **rule)
    assert [pruner.prune(model, epoch) for epoch in range(2)] == ["masked", "masked"]
    assert any(len(one.experts.down_proj) == EXPERTS for one in model.blocks) and pruner.sparsity > 0.3
    return pruner


def found_in(model: nn.Module) -> ChannelGroups:
    return Expert().find(model, {one.name for one in expert_blocks(model)[0]})


def smaller(dense: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """The model without the masked experts, made by hand."""
    model = copy.deepcopy(dense)
    for name, keep_E in masks.items():
        block = model.get_submodule(name)
        router = block.gate if isinstance(block, MoeBlock) else block.router
        for owner in (router, block.experts):
            for key, tensor in list(owner.named_parameters(recurse=False)):
                setattr(owner, key, nn.Parameter(tensor.detach()[keep_E]))
    return model


def counts(model: nn.Module) -> dict[str, int]:
    """Attributes that count experts."""
    named = model.named_modules()
    return {
        f"{name}.{key}": vars(one)[key]
        for name, one in named
        for key in ("num_experts", "num_local_experts")
        if key in vars(one)
    }


# --- laws -----------------------------------------------------------------------------------------------------------


@KINDS
def test_the_laws_of_groups(kind: type[nn.Module]) -> None:
    model, x = built(kind)
    law_checks.reduce_and_expand_are_adjoint(found_in(model).grouping)
    law_checks.masked_equals_removed(model, x, found_in(model))
    model, x = built(kind)
    law_checks.removal_keeps_the_optimizer_alive(model, x, found_in(model))


@KINDS
def test_masked_it_is_the_model_without_these_experts(kind: type[nn.Module]) -> None:
    model, x = built(kind)
    dense = copy.deepcopy(model)
    pruner = masked(model, x)
    masks = {name: keep.clone() for name, keep in pruner.masks.items()}
    expected = smaller(dense, masks)(x)
    assert (dense(x) - expected).abs().max() > 0.01
    assert torch.allclose(model(x), expected, atol=1e-6)
    parameters = pruner.report().parameters["kept"]
    pruner.remove()
    assert torch.allclose(model(x), expected, atol=1e-6)
    assert parameters == sum(one.numel() for one in model.parameters())
    assert pruner.macs.kept == count_macs(model, x)
    assert not any(one._forward_hooks for one in model.modules())


def test_a_masked_expert_has_probability_0_and_no_token() -> None:
    model, x = built()
    pruner = masked(model, x, scope="local")
    seen: dict[str, tuple[Tensor, ...]] = {}
    for name in pruner.masks:
        model.get_submodule(f"{name}.gate").register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
    model(x)
    for name, keep_E in pruner.masks.items():
        logits_TE, weight_TK, index_TK = seen[name]
        probability_TE = logits_TE.softmax(-1)
        assert bool((probability_TE[:, ~keep_E] == 0).all()) and bool((probability_TE[:, keep_E] > 0).all())
        assert keep_E[index_TK].all() and torch.equal(index_TK, torch.topk(logits_TE, TOP_K)[1])
        assert torch.allclose(weight_TK.sum(-1), torch.ones(len(x)))


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_masked_weights_are_zero_after_every_step(optimizer: str) -> None:
    model, x = built()
    chosen = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1, weight_decay=0.1)
    pruner = pruner_of(model, x, chosen, start=1, end=9)
    masked = 0
    for epoch in range(6):
        pruner.prune(model, epoch)
        chosen.zero_grad()
        model(x).square().mean().backward()
        chosen.step()
        masked += law_checks.check_masked_channels(pruner)
    assert masked > 0 and all(bool(one.isfinite().all()) for one in model.parameters())


@pytest.mark.parametrize("fraction", [0.8, 0.61])
def test_a_target_of_parameters_is_met_and_nothing_can_be_given_back(fraction: float) -> None:
    model, x = built()
    dense = sum(one.numel() for one in model.parameters())
    pruner_of(model, x, target={"parameters": fraction}).prune(model, 0)
    kept = sum(one.numel() for one in model.parameters())
    one_more = sum(one[0].numel() for one in model.blocks[0].parameters())
    assert kept <= fraction * dense < kept + one_more


def train(pruner: Pruning, model: nn.Module, optimizer: torch.optim.Optimizer, epochs: range) -> None:
    for epoch in epochs:
        for step in range(2):
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(10 * epoch + step))
            optimizer.zero_grad()
            (model(x) - x[:, :3]).square().mean().backward()
            optimizer.step()
        pruner.prune(model, epoch)


@pytest.mark.parametrize("application", ["mask", "remove"])
@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "reap"])
def test_resumed_it_ends_as_uninterrupted(criterion: str, application: str) -> None:
    def begin() -> tuple[Pruning, nn.Module, torch.optim.Optimizer]:
        model, x = built()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return pruner_of(model, x, optimizer, criterion=criterion, application=application, end=3), model, optimizer

    whole, model, optimizer = begin()
    train(whole, model, optimizer, range(5))
    first, half, momenta = begin()
    train(first, half, momenta, range(2))
    state = copy.deepcopy((first.state_dict(), half.state_dict(), momenta.state_dict()))
    again, resumed, optimizer = begin()
    again.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    optimizer.load_state_dict(state[2])
    train(again, resumed, optimizer, range(2, 5))
    assert counts(resumed) == counts(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_moving_averages_and_files_follow(tmp_path: Path) -> None:
    model, x = built()
    average = copy.deepcopy(model)
    rule = {"pattern": "experts", "target": {"sparsity": 0.7}, "end": 2}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=x, ema=average)
    assert pruner.prune(model, 0) == "masked"
    assert torch.allclose(average(x), model(x), atol=1e-6)
    pruner.remove()
    assert torch.allclose(average(x), model(x), atol=1e-6) and counts(average) == counts(model)
    loaded = load_pruned(built()[0], save_pruned(model, tmp_path / "experts.safetensors"))
    assert counts(loaded) == counts(model) and torch.equal(loaded(x), model(x))


def test_attributes_count_what_is_left() -> None:
    model, x = built(LooseBlock)
    pruner_of(model, x, scope="local").prune(model, 0)
    assert set(counts(model).values()) == {EXPERTS // 2} and len(counts(model)) == 5
    assert model.blocks[0].router.out_features == EXPERTS // 2
    model, x = built()
    pruner_of(model, x, layers=["blocks.0"], exclude=["blocks.1.gate"]).prune(model, 0)
    found = counts(model)
    assert found.pop(".num_experts") == EXPERTS, "blocks differ"
    assert {name.split(".")[1]: count for name, count in found.items()} == {"0": EXPERTS // 2, "1": EXPERTS}


# --- limits and refusals --------------------------------------------------------------------------------------------


def test_as_many_stay_as_a_token_takes() -> None:
    model, x = built()
    with pytest.raises(TargetError, match="out of reach.*at most 0.7500 of the groups"):
        pruner_of(model, x, target={"sparsity": 0.95})
    pruner_of(model, x, keep_per_layer=1, target={}).prune(model, 0)
    assert [len(one.experts.down_proj) for one in model.blocks] == [TOP_K, TOP_K]
    assert set(counts(model).values()) == {TOP_K}
    with pytest.raises(ModelError, match=f"a token takes {TOP_K} of its {TOP_K} experts, so that none can go"):
        pruner_of(model, x)


def test_by_hand() -> None:
    model, x = built()
    dense = copy.deepcopy(model)
    pruner = pruner_of(model, x, start=5)
    with pytest.raises(ConfigError, match=f"channels: 1 would be left of 'blocks.0'. Allowed: at least {TOP_K} stay"):
        pruner.remove_channels({"blocks.0.gate": list(range(EXPERTS - 1))})
    pruner.remove_channels({"blocks.0.gate": [0, 3]})
    keep_E = torch.ones(EXPERTS, dtype=torch.bool).index_fill(0, torch.tensor([0, 3]), False)
    assert torch.allclose(model(x), smaller(dense, {"blocks.0": keep_E})(x), atol=1e-6)


class Lonely(MoeBlock):
    """One tensor with an entry for each expert lies beside the router."""

    def __init__(self, width: int, experts: int, top_k: int) -> None:
        super().__init__(width, experts, top_k)
        self.shift = nn.Parameter(torch.zeros(experts))


class Uncounted(LooseBlock):
    """It does not say how many experts a token takes."""

    def __init__(self, width: int, experts: int, top_k: int) -> None:
        super().__init__(width, experts, top_k)
        del self.top_k
        self.few = top_k


class Unrouted(MoeBlock):
    """It has no router."""

    def __init__(self, width: int, experts: int, top_k: int) -> None:
        super().__init__(width, experts, top_k)
        self.gate = nn.Identity()  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Lonely, "blocks.0: its shift has an entry for each expert, outside the router"),
        (Uncounted, "blocks.0: how many experts a token takes is in none of the attributes top_k"),
        (Unrouted, "blocks.0: 0 of its modules have a weight with a row for each of its 8 experts"),
        (nn.Identity, ""),
    ],
)
def test_what_is_not_understood_is_refused_with_the_reason(kind: Any, reason: str) -> None:
    model, x = built(kind if kind is not nn.Identity else lambda *_: nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"the MoeNet has no block of experts that is known.*{reason}"):
        pruner_of(model, x)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"target": {"macs": 0.5}}, "target.macs: 0.5 is not supported by the pattern 'expert'. Allowed: "
         "target.sparsity, target.parameters"),
        ({"target": {"latency": 0.5}}, "target.latency: 0.5 is not supported by the pattern 'expert'"),
        ({"compensation": "bias"}, "compensation: 'bias' is not supported by the pattern 'expert'"),
        ({"criterion": "wanda"}, "criterion: 'wanda' scores channels and heads and whole blocks"),
        ({"criterion": "reap", "pattern": "channel"}, "criterion: 'reap' scores experts, not the groups of 'channel'"),
        ({"layers": ["embed"]}, r"layers: \['embed'\] selects no block of experts.*Allowed: blocks.0, blocks.1"),
        ({"layers": ["blocks.7"]}, "layers: 'blocks.7' is not known"),
    ],
)  # fmt: skip
def test_refusals(rule: dict[str, Any], message: str) -> None:
    model, x = built()
    with pytest.raises(ConfigError, match=message):
        pruner_of(model, x, **rule)


def test_a_graph_is_refused() -> None:
    model, x = built()
    with pytest.raises(ModelError, match="graph: 'expert' takes experts out of what routers choose from"):
        pruner_of(model, x).follow(torch.export.export(model, (x,)).module())


class Random(MoeBlock):
    """What it computes depends on how many experts there are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gate.num_experts


def test_code_that_is_not_understood_leaves_the_block_as_it_is(caplog: Any) -> None:
    model, x = built()
    model.blocks[1] = Random(moe.WIDTH, EXPERTS, TOP_K)
    pruner = pruner_of(model, x)
    assert set(pruner.masks) == {"blocks.0"}
    assert "blocks.1 stays as it is: removed, some of it would leave another model than masked" in caplog.text


# --- criteria -------------------------------------------------------------------------------------------------------


def test_every_criterion_ranks_experts_or_is_refused_by_name() -> None:
    refused = set()
    for criterion in names("criterion"):
        model, x = built()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        try:
            pruner = pruner_of(model, x, optimizer, criterion=criterion)
        except ConfigError as error:
            assert f"criterion: {criterion!r} scores" in str(error) or criterion == "bn_scale"
            refused.add(criterion)
            continue
        model(x).square().mean().backward()
        optimizer.step()
        pruner.prune(model, 0)
        assert sum(len(one.experts.down_proj) for one in model.blocks) == EXPERTS, criterion
    assert {"magnitude", "l1", "taylor", "snip", "geometric_median", "random", "reap"}.isdisjoint(refused)
    assert {"wanda", "variance", "obs", "reconstruction", "block_change", "mac_aware", "bn_scale"} <= refused


def reap_by_hand(block: nn.Module, x: Tensor) -> Tensor:
    """The mean over an expert's tokens of router weight times output norm, expert by expert, token by token."""
    _, weight_TK, index_TK = block.gate(x)
    scores_E = torch.zeros(EXPERTS)
    for expert in range(EXPERTS):
        found = []
        for token, place in (index_TK == expert).nonzero().tolist():
            gate, up = (block.experts.gate_up_proj[expert] @ x[token]).chunk(2)
            output = block.experts.down_proj[expert] @ (functional.silu(gate) * up)
            found.append(weight_TK[token, place] * output.norm())
        scores_E[expert] = torch.stack(found).mean() if found else 0.0
    return scores_E


def test_reap_by_hand() -> None:
    model, x = built()[0], torch.randn(300, 4, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        model.blocks[0].gate.bias[4] = -100.0  # no token goes there
    given: dict[str, Tensor] = {}
    for name in ("blocks.0", "blocks.1"):
        model.get_submodule(name).register_forward_pre_hook(lambda m, i, name=name: given.update({name: i[0]}))
    pruner = pruner_of(model, x, criterion={"type": "reap", "normalize": "none"}, target={"sparsity": 3 / 16})
    with torch.no_grad():
        model(x[:10])
        model(x[10:])
        scores_G = pruner.channel_pruner.scores(pruner.channel_pruner.rules[0])
        model(x)
        expected_G = torch.cat([reap_by_hand(model.get_submodule(name), one) for name, one in given.items()])
    assert float(scores_G[4]) == 0 and torch.allclose(scores_G.float(), expected_G, rtol=1e-5)
    with torch.no_grad():
        model.blocks[0].experts.down_proj[4] *= 1000  # the largest weights; still nobody goes there
    pruner.prune(model, 0)
    assert torch.equal(torch.cat([*pruner.masks.values()]), expected_G > 0) and int((expected_G == 0).sum()) == 3


def test_reap_on_calibration_data_leaves_the_model_alone() -> None:
    model, x = built()
    before = copy.deepcopy(model.state_dict())
    pruner = pruner_of(model, x, criterion="reap", scope="local")
    with pytest.raises(ModelError, match="Reap listens to training, and no step has been taken yet"):
        pruner.prune(model, 0)
    data = [(x, torch.zeros(len(x), dtype=torch.int64))]
    pruner.calibrate_with(data, functional.cross_entropy)
    pruner.prune(model, 0)
    dense = built()[0]
    dense.load_state_dict(before)
    with torch.no_grad():
        scores_E = reap_by_hand(dense.blocks[0], dense.embed(x))
    gone_E = ~pruner.masks["blocks.0"]
    assert int(gone_E.sum()) == EXPERTS // 2 and scores_E[gone_E].max() < scores_E[~gone_E].min()
    assert all(one.grad is None for one in model.parameters())
    found = one_shot(built()[0], {"pattern": "expert", "criterion": "reap", "scope": "local"}, data,
                     functional.cross_entropy, [0.25, 0.5])  # fmt: skip
    assert {key: len(one.blocks[0].experts.down_proj) for key, one in found.items()} == {0.25: 6, 0.5: 4}


def test_a_damaged_state_is_refused() -> None:
    model, x = built()
    pruner = pruner_of(model, x, criterion="reap", start=3)
    model(x)
    collector = pruner.channel_pruner.rules[0].feed.collector
    good = collector.state_dict()
    for damaged in (torch.zeros(2, EXPERTS + 1), "sums"):
        with pytest.raises(CheckpointError, match="state: sums of 'blocks.1', which do not fit the groups that remain"):
            collector.load_state_dict({**good, "blocks.1": damaged})
    assert all(torch.equal(collector.state_dict()[name], row) for name, row in good.items())


class Other(MoeBlock):
    """Its experts are given something else than tokens, numbers and weights."""

    def forward(self, x: Tensor) -> Tensor:
        _, weight_TK, index_TK = self.gate(x)
        return self.experts(x, [index_TK], weight_TK)


def test_experts_that_are_called_in_another_way_are_named() -> None:
    class Listed(moe.Experts):
        def forward(self, x_TH: Tensor, index: Any, weight_TK: Tensor) -> Tensor:
            return super().forward(x_TH, index[0], weight_TK)

    model, x = built()
    for number in range(2):
        model.blocks[number] = Other(moe.WIDTH, EXPERTS, TOP_K)
        model.blocks[number].experts = Listed(moe.WIDTH, 5, EXPERTS)
    pruner_of(model, x, criterion="reap")
    with pytest.raises(ModelError, match="blocks.0: its experts are given .*'reap' needs experts that are given"):
        model(x)
