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

from typing import Any

import pytest
import torch
import torchvision
from fake_device import Watch, fake_cuda, move_to_cuda, put_gradients
from torch import nn
from zoo import images

from pruningawaretraining.mask_factors import MaskFactors
from pruningawaretraining.masking import Masks
from pruningawaretraining.patterns.channel import Channel
from pruningawaretraining.registry import build
from pruningawaretraining.regularizers import prepare

CONSTANT = {"group_lasso": 20, "growing_l2": 36, "bn_scale": 20}
LAST = torch.channels_last


def launches(name: str, regularizer: str, dtype: torch.dtype, layout: torch.memory_format) -> dict[str, Any]:
    model = getattr(torchvision.models, name)(weights=None, num_classes=10)
    found = Channel().build(model, images(32, 1))
    keep_G = torch.arange(found.grouping.size) % 2 == 0
    masks = Masks(model, found.grouping, found.norms)
    ready = prepare(build("regularizer", regularizer), found.grouping)
    masks.set(keep_G)
    model.to(dtype, memory_format=layout)
    weights = {id(member.parameter): member.parameter for member in ready.index.grouping.members}
    counts: dict[str, Any] = {"weights": sum(one.dim() > 1 for one in weights.values())}
    with fake_cuda():
        move_to_cuda(model)
        for strict in (False, True):
            with Watch(strict) as gradients:
                put_gradients(model)
            with Watch(strict) as regularizing:
                ready(masks.keep_on(ready.index.device))
            with Watch(strict) as masking:
                masks.apply()
            with Watch(strict) as hooks:
                masks.apply_to_gradients()
    masked = {id(one) for one in masks._factors.parameters}
    return {
        **counts,
        "masked": len(masked),
        "gradients": gradients.launches,
        "regularizer": regularizing.launches,
        "sums": regularizing.operations.get("linalg_vector_norm", 0),
        "masks": masking.launches,
        "hooks": hooks.launches,
    }


@pytest.mark.parametrize("regularizer", CONSTANT)
@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.float32, torch.contiguous_format), (torch.float32, LAST), (torch.bfloat16, LAST)]
)
def test_a_step_launches_few_kernels(regularizer: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    for name in ("resnet18", "resnet50"):
        found = launches(name, regularizer, dtype, layout)
        assert found["sums"] <= 2 * found["weights"]
        assert found["regularizer"] <= 3 * found["weights"] + CONSTANT[regularizer]
        assert found["gradients"] <= found["masked"]
        assert found["masks"] <= 8
        assert found["hooks"] <= 8


def test_gradients_are_masked_together_at_the_end_of_the_backward_pass() -> None:
    """On the CPU, where there is a backward pass."""
    model = torchvision.models.resnet18(weights=None, num_classes=10)
    found = Channel().build(model, images(32, 1))
    masks = Masks(model, found.grouping, found.norms)
    masks.set(torch.arange(found.grouping.size) % 2 == 0)
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
