"""The laws of the design, on real architectures.

1 reduce and expand are adjoint; 2 masked equals removed; 3 a masked weight is 0 after every step; 4 a target is met
from the right side and nothing can be given back; 7 removal keeps the optimizer alive; 8 hooks hide and edit nothing.
What each means is in law_checks.py; tests/gpu holds the same zoo to them on a GPU.
"""

from __future__ import annotations

import copy
import functools

import law_checks
import pytest
import torch
import zoo
from torch import nn

from pruningawaretraining import Pruning
from pruningawaretraining.allocation.ranking import Limits
from pruningawaretraining.patterns.channel import Channel
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.registry import names


@functools.cache
def traced(name: str) -> tuple[nn.Module, torch.Tensor, ChannelGroups]:
    model, inputs = zoo.architecture(name)
    return model, inputs, Channel().build(model, inputs)


def fresh(name: str) -> tuple[nn.Module, torch.Tensor, ChannelGroups]:
    """A copy of the model with its groups on the copy's tensors."""
    model, inputs, found = traced(name)
    twin = copy.deepcopy(model)
    return twin, inputs, found.on(twin)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_reduce_and_expand_are_adjoint(name: str) -> None:
    law_checks.reduce_and_expand_are_adjoint(traced(name)[2].grouping)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_masked_equals_removed_and_analytic_macs_equal_counted_ones(name: str) -> None:
    law_checks.masked_equals_removed(*fresh(name))


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_masked_weights_are_zero_after_every_step_of(optimizer: str) -> None:
    assert law_checks.train_masked(*fresh("groupnorm")[:2], optimizer, 8) > 0


@pytest.mark.parametrize("name", zoo.NAMES)
def test_masked_weights_are_zero_after_every_step(name: str) -> None:
    assert law_checks.train_masked(*fresh(name)[:2], "SGD", 4) > 0


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


@pytest.mark.parametrize("scope", names("scope"))
@pytest.mark.parametrize("limits", law_checks.LIMITS, ids=str)
@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_mac_target_is_met_and_nothing_can_be_given_back(name: str, limits: Limits, scope: str) -> None:
    law_checks.target_is_met_and_nothing_can_be_given_back(*traced(name), limits, scope)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_removal_keeps_the_optimizer_alive(name: str) -> None:
    law_checks.removal_keeps_the_optimizer_alive(*fresh(name))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_hooks_leave_the_users_objects_alone(name: str) -> None:
    law_checks.hooks_leave_the_users_objects_alone(*fresh(name)[:2])
