"""A model that is moved after its pruner was made, and one that trains on another device than the CPU: both end as the
model that stays on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from second_device import THERE, second_device
from test_fake_device import PATTERNS, is_structured
from torch import nn

from pruningawaretraining import Pruning

EPOCHS = 6
MAXIMA = {"type": "movement", "reduction": "max"}
# pattern -> criteria that listen, each with a regulariser that acts beside it
RULES: dict[bool, list[tuple[Any, str]]] = {
    True: [("taylor", "growing_l2"), ("taylor", "group_lasso")],
    False: [
        ("snip_momentum", "block_lasso"),
        ("wanda", "slice_penalty"),
        ({"type": "movement", "reduction": "max"}, "block_lasso"),
    ],
}
CASES = [(pattern, *rule) for pattern in PATTERNS for rule in RULES[is_structured(pattern)]]


def trained(
    pattern: str, criterion: Any, regularizer: str, dtype: Any = None, device: Any = None, end: int = 3
) -> tuple[nn.Module, Pruning]:
    """A training in which masks grow from epoch 0 to ``end``, and channels go then; the model is moved at epoch 2."""
    make, spelled = PATTERNS[pattern]
    model, inputs = make()
    model, inputs = model.to(device).train(), inputs.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    rule = {
        "pattern": spelled, "criterion": criterion, "regularizer": {"type": regularizer, "strength": 0.02},
        "target": {"sparsity": 0.5}, "start": 0, "end": end, "scope": "local",
    }  # fmt: skip
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=inputs[:1], optimizer=optimizer)
    for epoch in range(EPOCHS):
        if epoch == 2 and dtype is not None:
            model.to(dtype)
            inputs = inputs.to(dtype)
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(inputs).square().mean() + pruner.slice_regularize(model)
            loss.backward()
            optimizer.step()
        pruner.prune(model, epoch)
    return model, pruner


def zeros_are_where_masks_say(pruner: Pruning) -> bool:
    """Whether every weight that is masked is 0."""
    masks = (
        [pruner.channel_pruner.masks]
        if pruner.engine.weights is None
        else [one.masks for one in pruner.engine.weights.rules]
    )
    return all(
        not bool(member.parameter.detach().cpu()[(keep_W == 0).expand(member.parameter.shape).cpu()].any())
        for one in masks
        for member, keep_W in one.grouping.expand(one.keep_G.float(), outside=1.0)
    )


def assert_alike(first: tuple[nn.Module, Pruning], second: tuple[nn.Module, Pruning], tolerance: float) -> None:
    (model, pruner), (other, others) = first, second
    assert pruner.phase == others.phase == "finetune"
    assert pruner.masks.keys() == others.masks.keys()
    assert all(torch.equal(keep.cpu(), others.masks[name].cpu()) for name, keep in pruner.masks.items())
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        mine, theirs = mine.detach().cpu().double(), theirs.detach().cpu().double()
        assert torch.allclose(mine, theirs, rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize(("pattern", "criterion", "regularizer"), CASES)
def test_a_model_that_is_moved_to_another_dtype_goes_on(pattern: str, criterion: Any, regularizer: str) -> None:
    plain = trained(pattern, criterion, regularizer)
    assert plain[1].sparsity > 0.3
    moved = trained(pattern, criterion, regularizer, torch.float64)
    assert_alike(plain, moved, 1e-3)
    assert {one.dtype for one in moved[0].parameters()} == {torch.float64}
    model, pruner = trained(pattern, criterion, regularizer, torch.bfloat16, end=9)
    assert pruner.sparsity > 0.2 and zeros_are_where_masks_say(pruner)
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    assert all(bool(one.isfinite().all()) for one in model.parameters())


@pytest.mark.parametrize(("pattern", "criterion", "regularizer"), CASES)
def test_a_training_on_another_device_ends_as_on_the_cpu(pattern: str, criterion: Any, regularizer: str) -> None:
    plain = trained(pattern, criterion, regularizer)
    with second_device():
        there = trained(pattern, criterion, regularizer, device=THERE)
        assert zeros_are_where_masks_say(there[1])
    assert_alike(plain, there, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_distillation_follows_a_model_that_is_moved(dtype: torch.dtype) -> None:
    model, inputs = zoo.architecture("groupnorm")
    config = {"rules": [{"target": {"sparsity": 0.5}}], "distillation": {"features": ["conv2", "hidden"]}}
    pruner = Pruning(model, config, example_inputs=inputs)
    pruner.prune(model, 0)
    pruner.remove()  # projectors stand between the features from here on
    losses = []
    for change in (torch.float32, dtype):
        model.to(change)
        inputs = inputs.to(change)
        for _ in range(2):
            model.zero_grad()
            loss = pruner.distill_loss(model(inputs), inputs)
            loss.backward()
            losses.append(float(loss.detach()))
    assert losses[1] > 0
    assert losses[2:] == pytest.approx(losses[1:2] * 2, rel=0.1)
    assert all(bool(one.grad.isfinite().all()) for one in model.parameters() if one.grad is not None)
