"""The laws of the design as checks of a model, on any device: test_laws.py and tests/gpu hold the zoo to them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining import Pruning, count_macs
from pruningawaretraining.allocation.ranking import Allocator, Limits
from pruningawaretraining.costs.macs import macs_cost, macs_per_layer, parameters_cost
from pruningawaretraining.criteria.base import Statistics
from pruningawaretraining.errors import TargetError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.masks.masks import Masks
from pruningawaretraining.masks.removal import remove
from pruningawaretraining.models.calling import outputs_of
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.registry import build

LIMITS = (Limits(), Limits(max_sparsity=0.7), Limits(min_sparsity=0.1), Limits(multiple=4), Limits(0.05, 0.8, 8))


def half(found: ChannelGroups, seed: int = 0) -> Tensor:
    """Random masks that remove about half of every set."""
    scores = build("criterion", {"type": "random", "seed": seed}).score(found.grouping, Statistics())
    return Allocator(found.grouping, scores, scope="local").at(0.5)


def reduce_and_expand_are_adjoint(grouping: Grouping, device: torch.device | str = "cpu") -> None:
    """Law 1."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(device)

    v_G = noise(grouping.size)
    x = [noise(*member.parameter.shape) for member in grouping.members]
    left = (grouping.reduce(x) * v_G).sum()
    right = sum((values * spread).sum() for values, (_, spread) in zip(x, grouping.expand(v_G), strict=True))
    assert float(left) == pytest.approx(float(right), rel=1e-10, abs=1e-8)


def masked_equals_removed(model: nn.Module, inputs: Tensor, found: ChannelGroups, tolerance: float = 1e-5) -> None:
    """Law 2, and that costs of masks are those of the removed model."""
    macs = macs_cost(found.grouping, macs_per_layer(model, inputs))
    parameters = parameters_cost(found.grouping, model)
    keep_G = half(found)
    masks = Masks.coupled(model, found)
    masks.set(keep_G)
    masked = outputs_of(model, inputs)
    masks.clear()
    remove(model, found, keep_G)
    removed = outputs_of(model, inputs)
    scale = max(float(out.abs().max()) for out in masked)
    assert scale > 0
    assert max(float((a - b).abs().max()) for a, b in zip(masked, removed, strict=True)) <= tolerance * scale
    assert macs(keep_G) == pytest.approx(count_macs(model, inputs), abs=0.5)
    assert parameters(keep_G) == pytest.approx(sum(p.numel() for p in model.parameters()), abs=0.5)


def gone_weights(pruner: Pruning) -> Iterator[tuple[str, Tensor]]:
    """What the weights that are masked by channel rules hold now, member by member."""
    masks = pruner.channel_pruner.masks
    for member, keep_W in masks.grouping.expand(masks.keep_G.float(), 1.0):
        gone_W = (keep_W == 0).to(member.parameter.device).expand(member.parameter.shape)
        yield member.name, member.parameter.detach()[gone_W]


def check_masked_channels(pruner: Pruning) -> int:
    """Every masked weight is exactly 0; returns how many there are."""
    masked = 0
    for name, values in gone_weights(pruner):
        assert bool((values == 0).all()), name
        masked += len(values)
    return masked


def train_masked(model: nn.Module, inputs: Tensor, optimizer: str, epochs: int) -> int:
    """Law 3: train with masks that grow, look after every step; returns how many masked weights were looked at."""
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
        masked += check_masked_channels(pruner)
    return masked


def target_is_met_and_nothing_can_be_given_back(
    model: nn.Module, inputs: Tensor, found: ChannelGroups, limits: Limits, scope: str
) -> None:
    """Law 4."""
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
            best = free[torch.argsort(scores.cpu()[one.start + free], descending=True, stable=True)[:wanted]]
            more_G = keep_G.clone()
            more_G[one.start + best] = True
            assert macs(more_G) > budget, one.name


def removal_keeps_the_optimizer_alive(model: nn.Module, inputs: Tensor, found: ChannelGroups) -> None:
    """Law 7."""
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


def hooks_leave_the_users_objects_alone(model: nn.Module, inputs: Tensor) -> None:
    """Law 8: modes, weights, methods, the config, gradients and random generators are as they were."""
    model.train()
    modules = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    modules[1].eval()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    methods = {name: getattr(model, name) for name in ("forward", "state_dict", "train")}
    generators = random_states(inputs.device)
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
    for known, now in zip(generators, random_states(inputs.device), strict=True):
        assert torch.equal(known, now)


def random_states(device: torch.device) -> list[Tensor]:
    """The states of the CPU's generator and of the device's."""
    found = [torch.random.get_rng_state()]
    return [*found, torch.cuda.get_rng_state(device)] if device.type == "cuda" else found
