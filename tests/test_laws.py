"""The laws of the design, on real architectures.

1 reduce and expand are adjoint; 2 masked equals removed; 3 a masked weight is 0 after every step; 4 a target is met
from the right side and nothing can be given back; 7 removal keeps the optimizer alive; 8 hooks hide and edit nothing.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import zoo
from torch import nn

from pruningawaretraining import Pruning, count_macs
from pruningawaretraining.allocation import Allocator, Limits
from pruningawaretraining.costs.macs import macs_cost, macs_per_layer, parameters_cost
from pruningawaretraining.errors import TargetError
from pruningawaretraining.inputs import outputs_of
from pruningawaretraining.masking import Masks
from pruningawaretraining.patterns.channel import Channel, ChannelGroups
from pruningawaretraining.registry import build, names
from pruningawaretraining.removal import remove
from pruningawaretraining.statistics import Statistics


@functools.cache
def traced(name: str) -> tuple[nn.Module, torch.Tensor, ChannelGroups]:
    model, inputs = zoo.architecture(name)
    return model, inputs, Channel().build(model, inputs)


def fresh(name: str) -> tuple[nn.Module, torch.Tensor, ChannelGroups]:
    """A copy of the model with its groups on the copy's tensors."""
    model, inputs, found = traced(name)
    twin = copy.deepcopy(model)
    return twin, inputs, found.on(twin)


def half(found: ChannelGroups, seed: int = 0) -> torch.Tensor:
    """Random masks that remove about half of every set."""
    scores = build("criterion", {"type": "random", "seed": seed}).score(found.grouping, Statistics())
    return Allocator(found.grouping, scores, scope="local").at(0.5)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_reduce_and_expand_are_adjoint(name: str) -> None:
    grouping = traced(name)[2].grouping
    generator = torch.Generator().manual_seed(0)
    v_G = torch.randn(grouping.size, dtype=torch.float64, generator=generator)
    x = [torch.randn(member.parameter.shape, dtype=torch.float64, generator=generator) for member in grouping.members]
    left = (grouping.reduce(x) * v_G).sum()
    right = sum((values * spread).sum() for values, (_, spread) in zip(x, grouping.expand(v_G), strict=True))
    assert left == pytest.approx(float(right), rel=1e-10, abs=1e-8)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_masked_equals_removed_and_analytic_macs_equal_counted_ones(name: str) -> None:
    model, inputs, found = fresh(name)
    macs = macs_cost(found.grouping, macs_per_layer(model, inputs))
    parameters = parameters_cost(found.grouping, model)
    keep_G = half(found)
    masks = Masks(model, found.grouping, found.norms)
    masks.set(keep_G)
    masked = outputs_of(model, inputs)
    masks.clear()
    remove(model, found, keep_G)
    removed = outputs_of(model, inputs)
    scale = max(float(out.abs().max()) for out in masked)
    assert scale > 0
    assert max(float((a - b).abs().max()) for a, b in zip(masked, removed, strict=True)) <= 1e-5 * scale
    assert macs(keep_G) == pytest.approx(count_macs(model, inputs), abs=0.5)
    assert parameters(keep_G) == pytest.approx(sum(p.numel() for p in model.parameters()), abs=0.5)


def train_masked(name: str, optimizer: str, epochs: int) -> int:
    """Train with masks that grow, look after every step; returns how many masked weights were looked at."""
    model, inputs, _ = fresh(name)
    options = {"momentum": 0.9} if optimizer in ("SGD", "RMSprop") else {}
    chosen = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1, weight_decay=0.1, **options)
    config = {"rules": [{"target": {"sparsity": 0.5}, "start": 1, "end": 9}]}
    pruner = Pruning(model, config, example_inputs=inputs[:1], optimizer=chosen)
    masked = 0
    for epoch in range(epochs):
        pruner.prune(model, epoch)
        chosen.zero_grad()
        model(inputs).square().mean().backward()
        chosen.step()
        masks = pruner.channel_pruner.masks
        for member, keep_W in masks.grouping.expand(masks.keep_G.float(), 1.0):
            gone = member.parameter.detach()[(keep_W == 0).expand(member.parameter.shape)]
            assert bool((gone == 0).all()), (epoch, member.name)
            masked += len(gone)
    return masked


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_masked_weights_are_zero_after_every_step_of(optimizer: str) -> None:
    assert train_masked("groupnorm", optimizer, 8) > 0


@pytest.mark.parametrize("name", zoo.NAMES)
def test_masked_weights_are_zero_after_every_step(name: str) -> None:
    assert train_masked(name, "SGD", 4) > 0


def test_masks_hold_in_a_loop_that_never_mentions_the_optimizer() -> None:
    model, inputs, _ = fresh("groupnorm")
    pruner = Pruning(model, {"rules": [{"target": {"sparsity": 0.5}, "end": 5}]}, example_inputs=inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(3):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        weight = model.conv1.weight.detach()
        kept = pruner.masks["conv1"].repeat(4) if len(pruner.masks["conv1"]) == 4 else pruner.masks["conv1"]
        assert bool((weight[~kept] == 0).all())
        assert bool((weight[kept] != 0).any())
        pruner.prune(model, epoch)


LIMITS = (Limits(), Limits(max_sparsity=0.7), Limits(min_sparsity=0.1), Limits(multiple=4), Limits(0.05, 0.8, 8))


@pytest.mark.parametrize("scope", names("scope"))
@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_mac_target_is_met_and_nothing_can_be_given_back(name: str, limits: Limits, scope: str) -> None:
    model, inputs, found = traced(name)
    grouping = found.grouping
    macs = macs_cost(grouping, macs_per_layer(model, inputs))
    scores = build("criterion", "magnitude").score(grouping, Statistics(macs=macs))
    allocator = Allocator(grouping, scores, limits, scope)
    budget = 0.55 * macs.dense
    try:
        keep_G = allocator.to_cost(macs, budget)
    except TargetError as error:
        assert "out of reach" in str(error)
        assert macs(allocator.smallest()) > budget
        return
    assert macs(keep_G) <= budget
    forced_G = allocator.forced_G
    for number, one in enumerate(grouping.sets):
        kept_G = keep_G[one.start : one.stop]
        kept, step = int(kept_G.sum()), int(allocator.step_S[number])
        assert kept >= 1
        assert kept == one.size or kept % step == 0 or kept == int(allocator.floor_S[number])
        assert 1 - kept / one.size <= limits.max_sparsity + 1e-9
        free = torch.nonzero(~kept_G & ~forced_G[one.start : one.stop]).flatten()
        wanted = min((kept // step + 1) * step, one.size) - kept
        if 0 < wanted <= len(free):
            best = free[torch.argsort(scores[one.start + free], descending=True, stable=True)[:wanted]]
            more_G = keep_G.clone()
            more_G[one.start + best] = True
            assert macs(more_G) > budget, one.name


@pytest.mark.parametrize("name", zoo.NAMES)
def test_removal_keeps_the_optimizer_alive(name: str) -> None:
    model, inputs, found = fresh(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True)
    average = torch.optim.swa_utils.AveragedModel(model)
    model(inputs).square().mean().backward()
    optimizer.step()
    keep_G = half(found)
    with torch.no_grad():
        for parameter in model.parameters():  # so that each entry of the state tells which weight it belongs to
            optimizer.state[parameter]["exp_avg"].copy_(parameter)
            parameter.grad.copy_(parameter)
    shapes = {key: parameter.shape for key, parameter in model.named_parameters()}
    remove(model, found, keep_G, [optimizer], [average])
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert known == {id(p) for p in model.parameters()}
    assert set(optimizer.state) == set(model.parameters())
    shrunk = 0
    for key, parameter in model.named_parameters():
        shrunk += parameter.shape != shapes[key]
        state = optimizer.state[parameter]
        assert torch.equal(state["exp_avg"], parameter)
        assert torch.equal(parameter.grad, parameter)
        assert state["exp_avg_sq"].shape == state["max_exp_avg_sq"].shape == parameter.shape
    assert shrunk > 0
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in model.parameters()]
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()
    average.update_parameters(model)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_hooks_leave_the_users_objects_alone(name: str) -> None:
    model, inputs, _ = fresh(name)
    model.train()
    modules = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    modules[1].eval()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    methods = {name: getattr(model, name) for name in ("forward", "state_dict", "train")}
    generator = torch.random.get_rng_state()
    config = {"rules": [{"target": {"sparsity": 0.5}, "start": 3}]}
    unchanged = copy.deepcopy(config)
    pruner = Pruning(model, config, example_inputs=inputs)
    pruner.prune(model, 0)
    pruner.report()
    assert config == unchanged
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {name: getattr(model, name) for name in methods} == methods
    assert not frozen.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), generator)
