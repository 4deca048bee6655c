"""Experts in one ranking with channels, heads and residual blocks; the knapsack is held against brute force.

Shape suffixes: ``_D`` groups of the dense model.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import moe
import pytest
import torch
from law_checks import check_masked_channels
from test_structures import (
    FACTOR,
    assert_savings_are_exact,
    decided,
    every_mask,
    given_back,
    lost,
    random_scores,
)
from torch import Tensor, nn

from pruningawaretraining import Pruning, count_macs, load_pruned, register, registry, save_pruned
from pruningawaretraining.config import load_config
from pruningawaretraining.engine.coupled import CoupledGroups
from pruningawaretraining.errors import ConfigError, TargetError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.masks.masks import Masks
from pruningawaretraining.masks.removal import remove
from pruningawaretraining.models.calling import outputs_of
from pruningawaretraining.models.skipped_blocks import PassThrough
from pruningawaretraining.patterns.expert import expert_blocks, is_of_experts
from pruningawaretraining.patterns.structures import is_block, without_contents

TEXT = {"input_ids": torch.tensor([[1, 5, 7, 2, 9, 3], [4, 4, 8, 1, 0, 2]])}
SMALL = {
    "vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 8, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
INNER = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {**INNER, "shared_expert_intermediate_size": 6},
    "eager Mixtral": {"num_local_experts": 4},
}


class Residual(moe.MoeBlock):
    """A block of experts that is a residual block itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Stack(nn.Module):
    """Residual blocks of experts between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.embed, self.head = nn.Linear(4, moe.WIDTH), nn.Linear(moe.WIDTH, 3)
        self.blocks = nn.Sequential(*(Residual(moe.WIDTH, 4, moe.TOP_K) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)))


ALL = ["channel", "head", "expert", "depth"]
NETS: dict[str, list[str]] = {
    "Mixtral": ["head", "expert", "depth"],
    "Olmoe": ["expert", "depth"],
    "Qwen2Moe": ALL,
    "eager Mixtral": ["channel", "expert", "depth"],
    "mixed": ["channel", "expert"],
    "stack": ALL,
}
"""Net -> the structures that are there."""


def built(net: str, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
    if net == "mixed":
        return moe.MoeNet(experts=4), x
    if net == "stack":
        return Stack(), x
    transformers = pytest.importorskip("transformers", "5.0", reason="experts are lists of layers before")
    kind = net.removeprefix("eager ")
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **FAMILIES[net], **options})
    model: Any = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    if kind != net:
        model.set_experts_implementation("eager")  # a loop over experts, through which channels can be followed
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    return model, TEXT


def pruner_of(
    net: str, optimizer: Any = None, model: nn.Module | None = None, **rule: Any
) -> tuple[Pruning, nn.Module]:
    model = built(net)[0] if model is None else model
    own = {"pattern": NETS[net], "criterion": "taylor", "target": {"parameters": 0.95}, **rule}
    return Pruning(model, {"rules": [own]}, example_inputs=built(net)[1], optimizer=optimizer), model


def groups_of(net: str, **rule: Any) -> CoupledGroups:
    coupled = pruner_of(net, **rule)[0].engine.coupled
    assert coupled is not None
    return coupled


def experts_of(grouping: Grouping) -> list[int]:
    return [number for number, one in enumerate(grouping.sets) if is_of_experts(one)]


def parameters(model: nn.Module) -> int:
    return sum(one.numel() for one in model.parameters())


# --- the groups -----------------------------------------------------------------------------------------------------


def test_the_sets_of_each_net() -> None:
    found = {net: [(one.name, one.size, one.least) for one in groups_of(net).dense_sets] for net in NETS}
    layers = [(f"model.layers.{n}", 1, 1) for n in range(2)]
    heads = [(f"model.layers.{n}.self_attn", 2, 1) for n in range(2)]
    experts = [(f"model.layers.{n}.mlp", 4, 2) for n in range(2)]
    shared = [(f"model.layers.{n}.mlp.shared_expert.gate_proj", 6, 1) for n in range(2)]
    assert found["Mixtral"] == [*heads, *experts, *layers]
    assert found["Olmoe"] == [*experts, *layers]
    assert found["Qwen2Moe"] == [*shared, *heads, *experts, *layers]
    assert found["eager Mixtral"] == [("model.layers.0.self_attn.o_proj", 16, 1), *experts, *layers]
    assert found["mixed"] == [("embed", 6, 1), ("blocks.0", 4, 2), ("blocks.1", 4, 2)]
    both = [("blocks.0.experts", 4, 2), ("blocks.1.experts", 4, 2), ("blocks.0", 1, 1), ("blocks.1", 1, 1)]
    assert found["stack"] == [("embed", 6, 1), *both]


def test_what_a_rule_selects_and_leaves_out(caplog: Any) -> None:
    found = [one.name for one in groups_of("mixed", exclude=["blocks.1.gate"]).dense_sets]
    assert found == ["embed", "blocks.1.experts.gate_up_proj", "blocks.0"], "what is in those experts is channels again"
    kept = groups_of("Mixtral", exclude=["model.layers.0.mlp.experts"]).dense_sets  # its block stays as well
    assert not {"model.layers.0", "model.layers.0.mlp"} & {one.name for one in kept}
    assert {"model.layers.0.self_attn", "model.layers.1", "model.layers.1.mlp"} <= {one.name for one in kept}
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    rule = {"pattern": ["channel", "expert"], "criterion": "taylor", "target": {"parameters": 0.6}}
    pruner = Pruning(plain, {"rules": [rule]}, example_inputs=torch.randn(2, 4))
    assert list(pruner.masks) == ["0"]
    assert "expert: rules[0].pattern: the Sequential has no block of experts that is known" in caplog.text


# --- the knapsack ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("net", "cost"), [("Mixtral", "parameters"), ("Olmoe", "parameters"), ("Mixtral", "macs"),
                                           ("mixed", "parameters"), ("mixed", "macs")])  # fmt: skip
def test_the_knapsack_against_every_mask(net: str, cost: str) -> None:
    """The target is met from the right side, and little more is lost than has to be."""
    coupled, ratios = groups_of(net), []
    linear = coupled.macs_cost if cost == "macs" else coupled.parameters_cost
    every = list(every_mask(coupled))
    spent = [linear(keep_D) / linear.dense for keep_D in every]
    for seed in range(2):
        scores_D = random_scores(coupled, seed)
        losses = [lost(coupled, keep_D, scores_D) for keep_D in every]
        for fraction in (0.45, 0.6, 0.8, 0.9):
            able = [loss for part, loss in zip(spent, losses, strict=True) if part <= fraction]
            if not able:
                with pytest.raises(TargetError, match="out of reach"):
                    decided(coupled, scores_D, **{cost: fraction})
                continue
            keep_D = decided(coupled, scores_D, **{cost: fraction})
            assert linear(keep_D) <= fraction * linear.dense
            ratios.append(lost(coupled, keep_D, scores_D) / min(able))
    assert ratios and min(ratios) >= 1 - 1e-9
    assert max(ratios) <= FACTOR, ratios
    assert sum(ratio <= 1 + 1e-9 for ratio in ratios) >= 0.6 * len(ratios), ratios


@pytest.mark.parametrize("net", ["Mixtral", "mixed"])
def test_several_targets_against_every_mask(net: str) -> None:
    """Parameters, which experts save, and MACs, which they do not."""
    coupled = groups_of(net)
    costs = {"parameters": coupled.parameters_cost, "macs": coupled.macs_cost}
    target = {"parameters": 0.6, "macs": 0.8}
    every = [one for one in every_mask(coupled) if all(costs[k](one) <= v * costs[k].dense for k, v in target.items())]
    for seed in range(3):
        scores_D = random_scores(coupled, seed)
        keep_D = decided(coupled, scores_D, **target)
        assert all(costs[name](keep_D) <= part * costs[name].dense for name, part in target.items())
        assert lost(coupled, keep_D, scores_D) <= FACTOR * min(lost(coupled, one, scores_D) for one in every)


def test_under_macs_alone_experts_go_last() -> None:
    """A router row saves little: heads go as long as they can, and what is out of reach is said."""
    coupled = groups_of("Mixtral", pattern=["head", "expert"], target={"macs": 0.95})
    heads, experts = coupled.dense_sets[:2], coupled.dense_sets[2:]
    linear, whole_D = coupled.macs_cost, torch.ones(len(coupled.keep_D), dtype=torch.bool)
    for one in heads:
        whole_D[one.stop - 1] = False  # one head of each
    for one in experts:
        whole_D[one.start + 2 : one.stop] = False
    least = linear(whole_D) / linear.dense
    scores_D = torch.ones(len(coupled.keep_D))
    keep_D = decided(coupled, scores_D, macs=0.9)
    assert all(bool(keep_D[one.start : one.stop].all()) for one in experts)
    keep_D = decided(coupled, scores_D, macs=least)
    assert all(int(keep_D[one.start : one.stop].sum()) == 2 for one in experts)
    with pytest.raises(TargetError, match=f"out of reach: .* leave at least {least:.4f}"):
        decided(coupled, scores_D, macs=least - 0.01)


@pytest.mark.parametrize("net", NETS)
def test_nothing_can_be_given_back_and_floors_hold(net: str) -> None:
    """Law 4; as many experts as a token takes stay in every block that stays."""
    coupled = groups_of(net)
    inside, linear, sets = coupled.rules[0].inside, coupled.parameters_cost, coupled.dense_sets
    for seed, fraction in itertools.product(range(2), (0.5, 0.7, 0.85)):
        keep_D, looked = decided(coupled, random_scores(coupled, seed), parameters=fraction), 0
        budget = fraction * linear.dense
        assert linear(keep_D) <= budget
        for number, one in enumerate(sets):
            kept = int(keep_D[one.start : one.stop].sum())
            if number in inside and not keep_D[sets[inside[number]].start]:
                assert kept == 0  # it is gone with its block
                continue
            assert is_block(one) or kept >= one.least
        for one, more_D in given_back(coupled, keep_D):
            assert linear(more_D) > budget, one.name
            looked += 1
        assert looked


def test_multiples_and_the_most_that_goes_hold_for_experts() -> None:
    coupled = groups_of("Olmoe", pattern=["expert", "depth"], multiple=2)
    for seed in range(4):
        keep_D = decided(coupled, random_scores(coupled, seed), parameters=0.7)
        assert all(int(keep_D[one.start : one.stop].sum()) in (0, 2, 4) for one in coupled.dense_sets if one.size == 4)
    with pytest.raises(TargetError, match="out of reach"):
        groups_of("Olmoe", max_sparsity=0.25, target={"parameters": 0.4})


# --- costs and removal ----------------------------------------------------------------------------------------------


def some_masks(coupled: CoupledGroups, seed: int, blocks: bool = True) -> Tensor:
    """Random masks that keep what always stays; with a block out, as an event leaves them: without what is in it."""
    keep_D = torch.rand(len(coupled.keep_D), generator=torch.Generator().manual_seed(seed)) > 0.5
    for number, one in enumerate(coupled.dense_sets):
        keep_D[one.start : one.start + one.least] = True
        if blocks and is_block(one):
            keep_D[one.start] = number % 2 == seed % 2
    return without_contents(keep_D, coupled.found.grouping, coupled.rules[0].inside)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("net", NETS)
def test_masked_equals_removed_and_costs_are_those_of_the_removed_model(net: str, seed: int) -> None:
    """Law 2; a block frees the experts in it, and parameters and MACs are exact."""
    coupled = groups_of(net)
    model, x, found = coupled.model, built(net)[1], coupled.found
    keep_D = some_masks(coupled, seed)
    dense = outputs_of(model, x)[0]
    masks = Masks.coupled(model, found)
    masks.set(keep_D)
    masked = outputs_of(model, x)[0]
    masks.clear()
    assert_savings_are_exact(coupled, keep_D)
    remove(model, found, keep_D)
    assert float((dense - masked).abs().max()) > 1e-3
    assert float((outputs_of(model, x)[0] - masked).abs().max()) <= 1e-5 * max(float(masked.abs().max()), 1.0)
    assert coupled.parameters_cost(keep_D) == parameters(model)
    assert coupled.macs_cost(keep_D) == count_macs(model, x)
    assert any(isinstance(one, PassThrough) for one in model.modules()) == ("depth" in NETS[net])
    left = found.restrict(model, keep_D).grouping
    counted = {len(one.module.experts.down_proj) for one in expert_blocks(model)[0]}
    assert {left.sets[n].size for n in experts_of(left)} - {0} == counted


def test_by_hand_after_a_block_is_gone() -> None:
    """What is left of the removed block's experts, none, is no reason to refuse others."""
    model, x = built("stack")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner, _ = pruner_of("stack", optimizer, model, pattern=["expert", "depth"], target={"parameters": 0.45})
    model(x).square().mean().backward()
    optimizer.step()
    pruner.prune(model, 0)
    (left,) = (n for n, one in enumerate(model.blocks) if not isinstance(one, PassThrough))
    assert len(model.blocks[left].experts.down_proj) == 3
    with pytest.raises(ConfigError, match=f"channels: 1 would be left of 'blocks.{left}.experts'. Allowed: at least 2"):
        pruner.remove_channels({f"blocks.{left}.gate": [0, 1]})
    pruner.remove_channels({f"blocks.{left}.gate": [0]})
    assert len(model.blocks[left].experts.down_proj) == 2


def test_counts_of_the_model_follow_the_blocks_that_are_left() -> None:
    """A removed block still has its experts while the others are counted."""
    coupled = groups_of("Mixtral")
    keep_D = torch.ones(len(coupled.keep_D), dtype=torch.bool)
    sets = {one.name: one for one in coupled.dense_sets}
    keep_D[sets["model.layers.0"].start] = False
    keep_D[sets["model.layers.1.mlp"].start] = False
    keep_D = without_contents(keep_D, coupled.found.grouping, coupled.rules[0].inside)
    remove(coupled.model, coupled.found, keep_D)
    model: Any = coupled.model
    assert model.num_experts == model.model.layers[1].mlp.experts.num_experts == 3


class Loop:
    """A user's loop."""

    def __init__(self, net: str, **rule: Any) -> None:
        self.model, self.x = built(net)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.pruner, _ = pruner_of(net, self.optimizer, self.model, **{"start": 1, "end": 4, **rule})

    def epoch(self, number: int) -> None:
        self.optimizer.zero_grad()
        out = self.model(**self.x, labels=self.x["input_ids"]).loss if isinstance(self.x, dict) else self.model(self.x)
        out.square().mean().backward()
        self.optimizer.step()
        if self.pruner.channel_pruner.masks.active:
            assert check_masked_channels(self.pruner) > 0  # law 3
        self.pruner.prune(self.model, number)


@pytest.mark.parametrize("application", ["mask", "remove"])
@pytest.mark.parametrize("net", NETS)
def test_a_loop_over_all_structures(net: str, application: str, tmp_path: Path) -> None:
    """Laws 3 and 7, and files of the masked model and of the result."""
    loop, dense = Loop(net, application=application, target={"parameters": 0.55, "macs": 0.97}), built(net)[0]
    for epoch in range(6):
        loop.epoch(epoch)
        if epoch in (3, 5):
            loaded = load_pruned(built(net)[0], save_pruned(loop.model, tmp_path / f"{epoch}.safetensors"))
            expected = outputs_of(loop.model.eval(), loop.x)[0]
            assert torch.allclose(outputs_of(loaded.eval(), loop.x)[0], expected, atol=1e-5)
            loop.model.train()
    found = list(loop.model.parameters())
    assert {id(p) for group in loop.optimizer.param_groups for p in group["params"]} == {id(p) for p in found}
    assert all(loop.optimizer.state[one]["exp_avg"].shape == one.shape for one in found)
    assert parameters(loop.model) <= 0.55 * parameters(dense)
    assert count_macs(loop.model, loop.x) <= 0.97 * count_macs(dense, loop.x)
    assert loop.pruner.report().parameters["kept"] == parameters(loop.model)
    assert loop.pruner.macs.kept == count_macs(loop.model, loop.x)


@pytest.mark.parametrize("application", ["mask", "remove"])
@pytest.mark.parametrize("stopped", [2, 4])
def test_resumed_equals_uninterrupted(stopped: int, application: str) -> None:
    """Law 5."""
    whole, first, again = (Loop("stack", application=application, target={"parameters": 0.4}) for _ in range(3))
    for epoch in range(6):
        whole.epoch(epoch)
    for epoch in range(stopped):
        first.epoch(epoch)
    saved = copy.deepcopy([first.pruner.state_dict(), first.model.state_dict(), first.optimizer.state_dict()])
    for part, state in zip((again.pruner, again.model, again.optimizer), saved, strict=True):
        part.load_state_dict(state)
    for epoch in range(stopped, 6):
        again.epoch(epoch)
    expected, found = whole.model.state_dict(), again.model.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_family_with_experts_in_the_list() -> None:
    loop, dense, seen = Loop("Mixtral", end=7, hold=2, target={"parameters": [0.8, 0.6]}), 0, []
    dense = parameters(loop.model)
    loop.pruner.on_member = lambda member: seen.append((member.name, parameters(loop.model) / dense))
    for epoch in range(9):
        loop.epoch(epoch)
    loop.pruner.on_train_end()
    assert [name for name, _ in seen] == ["0.80", "0.60"]
    assert all(float(name) - 0.15 < kept <= float(name) for name, kept in seen)


def test_another_rule_beside_experts_and_heads() -> None:
    """Without blocks a list is a rule as any other."""
    model, x = built("Qwen2Moe")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rules = [
        {"pattern": ["head", "expert"], "criterion": "taylor", "target": {"parameters": 0.8}},
        {"layers": ["re:.*shared_expert.(gate|up)_proj"], "scope": "local", "target": {"sparsity": 0.5}},
    ]
    pruner = Pruning(model, {"rules": rules}, example_inputs=x, optimizer=optimizer)
    dense = parameters(model)
    model(**x, labels=x["input_ids"]).loss.backward()
    optimizer.step()
    assert pruner.prune(model, 0) == "removed"
    assert parameters(model) <= 0.8 * dense and pruner.macs.kept == count_macs(model, x)
    assert [one.mlp.shared_expert.gate_proj.out_features for one in model.model.layers] == [3, 3]


def test_a_registered_cost_beside_parameters() -> None:
    """It follows the MACs of its layers, so that experts hardly count in it."""
    register("cost", "twice")(lambda name, module, macs: 2.0 * macs)
    try:
        loop, dense = (
            Loop("Mixtral", pattern=["head", "expert"], target={"parameters": 0.7, "twice": 0.9}),
            built("Mixtral"),
        )
        for epoch in range(5):
            loop.epoch(epoch)
        assert parameters(loop.model) <= 0.7 * parameters(dense[0])
        assert count_macs(loop.model, TEXT) <= 0.9 * count_macs(*dense)
    finally:
        del registry._ENTRIES["cost"]["twice"]


@pytest.mark.parametrize("net", ["Mixtral", "Olmoe"])
def test_with_equal_widths_the_config_follows(net: str, tmp_path: Path) -> None:
    """As with experts alone: ``from_pretrained`` loads the result."""
    pattern = ["head", "expert"] if net == "Mixtral" else ["expert", "depth"]
    loop = Loop(net, pattern=pattern, widths="uniform", target={"parameters": 0.75}, max_sparsity=0.5)
    for epoch in range(6):
        loop.epoch(epoch)
    model: Any = loop.model.eval()
    (left,) = {len(one.module.experts.down_proj) for one in expert_blocks(model)[0]}
    assert left < 4 and model.config.num_experts == model.num_experts == left
    if any(isinstance(one, PassThrough) for one in model.modules()):
        return  # a config cannot leave out a layer
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(outputs_of(loaded, TEXT)[0], outputs_of(model, TEXT)[0], atol=1e-5)


# --- the config -----------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "magnitude": ({"criterion": "magnitude"}, r"criterion: 'magnitude' is not a change of the loss.*Allowed: .*taylor"),
    "reap": ({"criterion": "reap"}, r"criterion: 'reap' is not a change of the loss.*Allowed: .*taylor"),
    "a solver": ({"criterion": "obs"}, r"'obs' does not score all .*Allowed: [a-z_, ]*taylor"),
    "latency": ({"target": {"latency": 0.5}}, r"target.latency: 0.5 cannot be weighed against experts: a token takes"),
    "ms": ({"target": {"latency_ms": 5, "parameters": 0.5}}, r"target.latency_ms: 5.0 cannot be weighed against"),
    "memory": ({"target": {"peak_memory": 0.5}}, r"target.peak_memory: .*Allowed with experts: target.parameters"),
    "sparsity": ({"target": {"sparsity": 0.5}}, r"target.sparsity: a count of groups means .* target.parameters$"),
    "per layer": ({"target": {}, "keep_per_layer": 2}, r"sparsity_per_layer, keep_per_layer: a count of groups"),
    "ranking": ({"allocation": "ranking"}, r"allocation: 'ranking' does not weigh .*Allowed: macs, parameters$"),
    "by latency": ({"allocation": "latency"}, r"allocation: 'latency' cannot be weighed against experts"),
    "dynamic": ({"dynamic": "straight_through"}, r"dynamic: 'straight_through' needs gradients of .*Allowed .*frozen"),
    "compensation": ({"compensation": "bias"}, r"compensation: 'bias' is not supported by the pattern"),
    "scope": ({"scope": "local"}, r"scope: 'local' has no effect where blocks, experts.*Allowed: global"),
    "twice": ({"pattern": ["expert", "moe"]}, r"pattern\[1\]: 'moe' is listed twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_compare_with_experts_is_refused_when_the_config_is_read(name: str) -> None:
    changes, message = REFUSED[name]
    own = {"pattern": ["head", "expert"], "criterion": "taylor", "target": {"parameters": 0.5}}
    with pytest.raises(ConfigError, match=message) as caught:
        load_config({"rules": [{**own, **changes}]})
    assert "\n" not in str(caught.value)
