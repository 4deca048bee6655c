"""How many kernels a training step launches on a GPU beside the model's own, counted on fake CUDA tensors.

Counted on torchvision's ResNets with half of the channels masked, every channel in one group of norms, convolutions and
the classifier's inputs (resnet50: 53 convolutions, 53 norms with weight and bias):

- regulariser: 2 launches for the sums of a weight with groups along outputs and inputs, 1 for one with groups along one
  of them; 1 for the gradient of either; and a number that does not depend on the number of layers (all norms together,
  the sum over groups, their factors).
- masks: a few for all parameters together, one more for a parameter with more than ``SPELLED`` elements.
- masks of gradients: as few, at the end of the backward pass; 1 for each parameter with masks where processes train
  together, because there each gradient is on its way to the others once it is accumulated.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torchvision
from fake_device import Watch, fake_cuda, move_to_cuda, put_gradients
from torch import nn
from zoo import images

from pruningawaretraining.masks.factor_writer import MaskFactors
from pruningawaretraining.masks.masks import Masks
from pruningawaretraining.masks.penalties import prepare
from pruningawaretraining.patterns.channel import Channel
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.registry import build, names

CONSTANT = 36
LAST = torch.channels_last
CHANNELS = [name for name in names("regularizer") if hasattr(build("regularizer", name), "prepare")]
CASES = [
    *(("resnet18", name, torch.float32, torch.contiguous_format) for name in CHANNELS),
    ("resnet18", "growing_l2", torch.float32, LAST),
    ("resnet18", "growing_l2", torch.bfloat16, LAST),
    ("resnet50", "growing_l2", torch.float32, LAST),
]


@functools.cache
def traced(name: str) -> tuple[nn.Module, ChannelGroups]:
    model = getattr(torchvision.models, name)(weights=None, num_classes=10)
    return model, Channel().build(model, images(32, 1))


def masked_half(name: str) -> tuple[nn.Module, ChannelGroups, Masks]:
    """A copy of a model with every other channel masked."""
    model = copy.deepcopy(traced(name)[0])
    found = traced(name)[1].on(model)
    masks = Masks.coupled(model, found)
    masks.set(torch.arange(found.grouping.size) % 2 == 0)
    return model, found, masks


@pytest.mark.parametrize(("name", "regularizer", "dtype", "layout"), CASES)
def test_a_step_launches_few_kernels(name: str, regularizer: str, dtype: Any, layout: Any) -> None:
    model, found, masks = masked_half(name)
    ready = prepare(build("regularizer", regularizer), found.grouping)
    model.to(dtype, memory_format=layout)
    weights = {id(member.parameter): member.parameter for member in ready.index.grouping.members}
    count = sum(one.dim() > 1 for one in weights.values())
    with fake_cuda():
        move_to_cuda(model)
        for strict in (False, True):
            put_gradients(model)
            with Watch(strict) as regularizing:
                ready(masks.keep_on(ready.index.device))
            with Watch(strict) as masking:
                masks.apply()
            with Watch(strict) as gradients:
                masks.apply_to_gradients()
    assert regularizing.operations.get("linalg_vector_norm", 0) <= 2 * count
    assert 0 < regularizing.launches <= 3 * count + CONSTANT
    assert 0 < masking.launches <= 3 and 0 < gradients.launches <= 3


def test_processes_that_train_together_mask_each_gradient_by_one_launch() -> None:
    model, _, masks = masked_half("resnet18")
    with fake_cuda():
        move_to_cuda(model)
        masks.apply()
        with Watch() as watch:
            put_gradients(model)  # outside of a backward pass, as if there were others
    masked = {id(one) for one in masks._writer._factors.parameters}
    assert len(masked) > 50 and watch.launches == len(masked)


def test_gradients_are_masked_together_at_the_end_of_the_backward_pass() -> None:
    """On the CPU, where there is a backward pass."""
    model, found, masks = masked_half("resnet18")
    at_the_end: list[float] = []
    model.conv1.weight.register_post_accumulate_grad_hook(lambda one: at_the_end.append(float(one.grad[1].abs().max())))
    loss = model(images(32, 2)).square().sum() + sum(one.square().sum() + one.sum() for one in model.parameters())
    with Watch(strict=False) as watch:
        loss.backward()
    assert watch.operations.keys() & {"_foreach_mul_"} == {"_foreach_mul_"}
    assert at_the_end[0] > 0, "not one by one"
    for member, keep_W in found.grouping.without_role("buffer").expand(masks.keep_G.float(), outside=1.0):
        assert not member.parameter.grad[(keep_W == 0).expand(member.parameter.shape)].any(), member.name
        assert member.parameter.grad.any()


def test_a_backward_pass_that_fails_leaves_nothing_undone() -> None:
    parameter = nn.Parameter(torch.ones(4))
    factors = MaskFactors([parameter], [torch.tensor([0.0, 1, 1, 1])])
    parameter.register_post_accumulate_grad_hook(factors.accumulated)
    other = nn.Parameter(torch.ones(4))
    fails = other.register_post_accumulate_grad_hook(lambda one: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        (parameter * other.detach()).sum().add((other**2).exp().sum()).backward()
    fails.remove()
    parameter.grad = None
    (parameter * 2).sum().backward()
    assert parameter.grad.tolist() == [0, 2, 2, 2]
