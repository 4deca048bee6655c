"""Real steps: the regulariser acts once in each, whatever loop it is, and masked gradients enter no norm.

Every loop is compared with the plain one, in which the regulariser is added by hand after backward.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pruningawaretraining import Pruning
from pruningawaretraining.masks.penalties import prepare
from pruningawaretraining.patterns.channel import Channel
from pruningawaretraining.registry import build

REGULARIZER = {"type": "growing_l2", "strength": 0.05}
RULE = {"target": {"sparsity": 0.5}, "start": 100, "regularizer": REGULARIZER}
STEPS = 4
OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "adamw foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True, foreach=True),
    "adam fused": lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
    "sgd fused": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, fused=True),
}


def small() -> nn.Module:
    return zoo.architecture("groupnorm")[0].train()


def batch(number: int) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(number))


def loss_of(model: nn.Module, number: int) -> Tensor:
    return model(batch(number)).square().mean()


def weights_of(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def by_hand(model: nn.Module) -> Callable[[], None]:
    """The regulariser as a function to call after backward."""
    ready = prepare(build("regularizer", REGULARIZER), Channel().build(model, batch(0)).grouping)
    return lambda: ready()


@functools.cache
def plain_loop(name: str, passes: int = 1, skip: tuple[int, ...] = (), regularize: bool = True) -> nn.Module:
    model = small()
    optimizer, add = OPTIMIZERS[name](model.parameters()), by_hand(model)
    for step in range(STEPS):
        if step in skip:
            continue
        optimizer.zero_grad()
        for number in range(passes):
            loss_of(model, step * passes + number).backward()
        if regularize:
            add()
        optimizer.step()
    return model


def pruned_loop(
    make: Any, how: str, passes: int = 1, scaler: Any = None, unscale: bool = False, overflow: Iterable[int] = ()
) -> tuple[nn.Module, Pruning]:
    """The loop of a user: ``how`` he tells the pruner of his steps; a scaler; several passes; steps that overflow."""
    model = small()
    optimizer = make(model.parameters())
    given = optimizer if how == "attached" else None
    pruner = Pruning(model, {"rules": [RULE]}, example_inputs=batch(0), optimizer=given)
    scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
    for step in range(STEPS):
        optimizer.zero_grad()
        for number in range(passes):
            loss = loss_of(model, step * passes + number) * (float("inf") if step in overflow else 1.0)
            scaler.scale(loss).backward()
            if how == "called":
                pruner.channel_regularize(model)
        if unscale:
            scaler.unscale_(optimizer)
        if how == "hooks":
            pruner.on_before_optimizer_step()
        scaler.step(optimizer)
        if how == "hooks":
            pruner.on_after_optimizer_step()
        scaler.update()
    return model, pruner


@pytest.mark.parametrize("how", ["attached", "found", "called", "hooks"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accumulation_and_loss_scale_change_nothing(name: str, how: str) -> None:
    for passes, scale, unscale in ((1, None, False), (3, 2.0**12, False), (3, 2.0**12, True)):
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        model, pruner = pruned_loop(OPTIMIZERS[name], how, passes, scaler, unscale)
        assert_same(model, plain_loop(name, passes))
        assert pruner.steps == STEPS
    without = plain_loop(name, regularize=False)
    assert not torch.equal(without.conv1.weight, plain_loop(name).conv1.weight)


@pytest.mark.parametrize("how", ["attached", "called"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("overflow", [(0,), (1, 2)])
def test_steps_that_overflow_are_no_steps(name: str, how: str, overflow: tuple[int, ...]) -> None:
    if name == "sgd fused" and 0 in overflow:
        pytest.skip("torch's fused SGD leaves its momentum uninitialised when its first step overflows")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    model, pruner = pruned_loop(OPTIMIZERS[name], how, 1, scaler, overflow=overflow)
    assert_same(model, plain_loop(name, skip=overflow))
    assert pruner.steps == STEPS - len(overflow)


def test_a_loop_without_any_optimizer_gets_the_penalty_at_the_call_from_its_second_step_on() -> None:
    model, expected = small(), small()
    pruner = Pruning(model, {"rules": [RULE]}, example_inputs=batch(0))
    add = by_hand(expected)
    for step in range(3):
        for one, regularize in ((model, pruner.channel_regularize), (expected, add if step else lambda: None)):
            one.zero_grad()
            loss_of(one, step).backward()
            regularize()
            with torch.no_grad():
                for parameter in one.parameters():
                    parameter -= 0.1 * parameter.grad
        pruner.on_after_optimizer_step()
    assert_same(model, expected)
    assert pruner.steps == 3


def test_an_optimizer_met_after_removals_follows_them() -> None:
    def started(attached: bool) -> tuple[nn.Module, torch.optim.Optimizer, list[int], Pruning]:
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        loss_of(model, 0).backward()
        optimizer.step()  # momentum of the dense shapes, before there is a pruner
        rule = {"target": {"sparsity": 0.5}, "start": 0, "end": 1, "application": "remove"}
        given = optimizer if attached else None
        pruner = Pruning(model, {"rules": [rule]}, example_inputs=batch(0), optimizer=given)
        widths = []
        for epoch in range(2):
            pruner.prune(model, epoch)
            pruner.remove()
            widths.append(sum(one.numel() for one in model.parameters()))
        return model, optimizer, widths, pruner

    (model, met, widths, _pruner), (expected, known, _, _other) = started(False), started(True)
    assert widths[0] > widths[1]
    for one, optimizer in ((model, met), (expected, known)):
        optimizer.zero_grad()
        for step in range(2):
            loss_of(one, step).backward()
            optimizer.step()
    assert_same(model, expected)
    assert [id(one) for one in met.param_groups[0]["params"]] == [id(one) for one in model.parameters()]
    assert [one["momentum_buffer"].shape for one in met.state.values()] == [one.shape for one in met.state]


@pytest.mark.parametrize("scale", [None, 2.0**10])
@pytest.mark.parametrize("attached", [True, False])
def test_several_optimizers_make_one_step_together(attached: bool, scale: float | None) -> None:
    def split(model: nn.Module) -> list[torch.optim.Optimizer]:
        parameters = list(model.parameters())
        return [
            torch.optim.SGD(parameters[:5], lr=0.05, momentum=0.9),
            torch.optim.Adam(parameters[5:], lr=0.01, fused=scale is not None),
        ]

    expected = small()
    optimizers, add = split(expected), by_hand(expected)
    for step in range(STEPS):
        expected.zero_grad()
        loss_of(expected, step).backward()
        add()
        for optimizer in optimizers:
            optimizer.step()
    model = small()
    optimizers = split(model)
    pruner = Pruning(model, {"rules": [RULE]}, example_inputs=batch(0))
    for optimizer in optimizers if attached else ():
        pruner.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for step in range(STEPS):
        model.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    assert_same(model, expected)
    assert pruner.steps == STEPS


def test_an_optimizer_around_another_penalises_once() -> None:
    class Around(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure: Any = None) -> None:
            self.inner.step()

    for how in ("attached", "found", "called"):
        model, pruner = pruned_loop(lambda parameters: Around(OPTIMIZERS["sgd"](parameters)), how)
        assert_same(model, plain_loop("sgd"))
        assert pruner.steps == STEPS


class HasNoHooks:
    """Like the wrappers of training libraries: it has an optimizer, and is none."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.step, self.zero_grad = optimizer.step, optimizer.zero_grad
        self.param_groups = optimizer.param_groups


def test_a_wrapper_without_hooks_leads_to_the_optimizer_inside() -> None:
    model, pruner = pruned_loop(lambda parameters: HasNoHooks(OPTIMIZERS["adam"](parameters)), "attached")
    assert_same(model, plain_loop("adam"))
    assert pruner.steps == STEPS


def test_the_optimizers_of_other_models_are_none_of_ours() -> None:
    model, other = small(), small()
    pruner = Pruning(model, {"rules": [RULE]}, example_inputs=batch(0))
    optimizer = OPTIMIZERS["sgd"](other.parameters())
    loss_of(other, 0).backward()
    optimizer.step()
    assert pruner.steps == 0
    expected = small()
    optimizer = OPTIMIZERS["sgd"](expected.parameters())
    loss_of(expected, 0).backward()
    optimizer.step()
    assert_same(other, expected)


CLOSED: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "sgd": OPTIMIZERS["sgd"],
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=4, history_size=3),
    "wolfe": lambda parameters: torch.optim.LBFGS(parameters, max_iter=4, line_search_fn="strong_wolfe"),
}


def closed_loop(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, add: Any = None) -> None:
    for step in steps:

        def closure(number: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, number)
            loss.backward()
            if add is not None:
                add()
            return loss

        if step % 2:
            optimizer.step(closure)
        else:
            optimizer.step(closure=closure)


@pytest.mark.parametrize("name", CLOSED)
def test_closures_are_regularised_in_each_evaluation(name: str) -> None:
    expected, model = small(), small()
    closed_loop(expected, CLOSED[name](expected.parameters()), range(STEPS), by_hand(expected))
    optimizer = CLOSED[name](model.parameters())
    pruner = Pruning(model, {"rules": [RULE]}, example_inputs=batch(0), optimizer=optimizer)
    closed_loop(model, optimizer, range(STEPS))
    assert_same(model, expected)
    assert pruner.steps == STEPS


def masked_weights(pruner: Pruning) -> Tensor:
    """Every masked entry of every weight."""
    masks = pruner.channel_pruner.masks
    parts = [
        member.parameter.detach()[(keep_W == 0).expand(member.parameter.shape)]
        for member, keep_W in masks.grouping.expand(masks.keep_G.float(), 1.0)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("name", ["lbfgs", "wolfe"])
def test_lbfgs_keeps_masks_and_goes_on_after_removal(name: str) -> None:
    results = []
    for removed in (False, True):
        model = small()
        optimizer = CLOSED[name](model.parameters())
        config = {"rules": [{"target": {"sparsity": 0.5}, "end": 1}]}
        pruner = Pruning(model, config, example_inputs=batch(0), optimizer=optimizer)
        closed_loop(model, optimizer, range(2))
        pruner.prune(model, 0)
        closed_loop(model, optimizer, range(2, 4))
        assert len(masked_weights(pruner)) > 0
        assert bool((masked_weights(pruner) == 0).all())
        if removed:
            pruner.remove()
        closed_loop(model, optimizer, range(4, 6))
        results.append(model(batch(9)).detach())
    assert torch.allclose(results[0], results[1], atol=1e-2 * float(results[0].abs().max()))


def kept_norm(pruner: Pruning, model: nn.Module) -> Tensor:
    """The norm over the gradients of weights that are not masked, from a copy that no hook knows."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    loss_of(twin, 5).backward()
    masks = pruner.channel_pruner.masks
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for member, keep_W in masks.grouping.expand(masks.keep_G.float(), 1.0):
        gradients[member.name].mul_(keep_W)
    return torch.stack([gradient.norm() for gradient in gradients.values()]).norm()


@pytest.mark.parametrize("attached", [True, False])
def test_masked_gradients_do_not_enter_the_norm(attached: bool) -> None:
    model = small()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    config = {"rules": [{"target": {"sparsity": 0.5}, "end": 3}]}
    pruner = Pruning(model, config, example_inputs=batch(0), optimizer=optimizer if attached else None)
    for epoch in range(2):
        pruner.prune(model, epoch)
        expected = kept_norm(pruner, model)
        optimizer.zero_grad()
        loss_of(model, 5).backward()
        assert torch.allclose(nn.utils.clip_grad_norm_(model.parameters(), 0.1), expected, rtol=1e-6)
        optimizer.step()
    hooks = [parameter._post_accumulate_grad_hooks for parameter in model.parameters()]
    assert any(hooks)
    pruner.remove()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "fused" not in name])
def test_training_masked_with_clipping_is_training_removed(name: str) -> None:
    """The strongest form: what is masked has no influence on anything, momenta and norms included."""
    results = []
    for removed in (False, True):
        model = small()
        optimizer = OPTIMIZERS[name](model.parameters())
        config = {"rules": [{"target": {"sparsity": 0.5}, "end": 1}]}
        pruner = Pruning(model, config, example_inputs=batch(0), optimizer=optimizer)
        for step in range(6):
            if step == 2:
                pruner.prune(model, 0)
            if step == 4 and removed:
                pruner.remove()
            optimizer.zero_grad()
            loss_of(model, step).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
        results.append(model(batch(9)).detach())
    assert torch.allclose(results[0], results[1], atol=1e-5 * float(results[0].abs().max()))


def test_a_pruner_may_be_collected_while_an_optimizer_steps() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = {"rules": [{"target": {"sparsity": 0.5}}]}
    pruners = [Pruning(nn.Linear(4, 4), {"rules": [{"pattern": "2:4", "target": {"sparsity": 0.5}}]})]

    def forget(*_: Any) -> None:
        pruners.clear()
        gc.collect()

    handle = register_optimizer_step_pre_hook(forget)
    try:
        own = Pruning(model, rule, example_inputs=torch.randn(2, 4))
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    finally:
        handle.remove()
    assert pruners == [] and own.steps == 1
