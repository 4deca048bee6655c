"""Training with channel rules on a GPU: optimizers, mixed precision, memory formats, moved and half models."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from gpu_training import EPOCHS, RULE, Loop, MakeOptimizer, batch, check_reached, check_state, network, resnet, sgd
from torch import nn
from torch.nn import functional

from pruningawaretraining import Pruning

AdamW, Adam = torch.optim.AdamW, torch.optim.Adam
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "SGD": sgd,
    "AdamW, fused": partial(AdamW, lr=1e-3, fused=True),
    "Adam, foreach": partial(Adam, lr=1e-3, foreach=True),
}


def loop_of(device: torch.device, make: MakeOptimizer = sgd, rule: Any = None, **options: Any) -> Loop:
    model = network(device)
    optimizer = make(model.parameters())
    images, _ = batch(device)
    pruner = Pruning(model, {"rules": [rule or RULE]}, example_inputs=images[:1], optimizer=optimizer)
    return Loop(model, pruner, optimizer, **options)


def check(loop: Loop, device: torch.device) -> None:
    check_reached(loop.pruner)
    check_state(loop.model, loop.optimizer, device)
    assert loop.looked_at > 0
    assert loop.pruner.steps == loop.attempted - loop.skipped
    images, _ = batch(device)
    assert bool(torch.isfinite(loop.model.eval()(images)).all())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_hold_and_the_target_is_met(device: torch.device, name: str) -> None:
    check(loop_of(device, OPTIMIZERS[name]).run(device), device)


def test_capturable_adam_keeps_its_state_on_the_gpu(cuda: torch.device) -> None:
    loop = loop_of(cuda, partial(Adam, lr=1e-3, capturable=True, foreach=True)).run(cuda)
    check(loop, cuda)
    assert all(state["step"].device.type == "cuda" for state in loop.optimizer.state.values())


def test_bf16_autocast_with_fused_adamw(device: torch.device) -> None:
    check(loop_of(device, OPTIMIZERS["AdamW, fused"], amp=torch.bfloat16).run(device), device)


@pytest.mark.parametrize(
    ("name", "clip"), [("SGD", 1.0), ("SGD", None), ("AdamW, fused", None)], ids=["clipped", "unclipped", "fused"]
)
def test_a_gradient_scaler_that_overflows(device: torch.device, name: str, clip: float | None) -> None:
    """Steps that were skipped count as none; the scale is divided out of the gradients but not of the penalty."""
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**24)
    loop = loop_of(device, OPTIMIZERS[name], amp=torch.float16, scaler=scaler, clip=clip).run(device, steps=3)
    assert 0 < loop.skipped < loop.attempted
    check(loop, device)


def test_channels_last(device: torch.device) -> None:
    loop = loop_of(device, amp=torch.bfloat16)
    loop.model.to(memory_format=torch.channels_last)
    check(loop.run(device), device)


def test_the_regulariser_adds_the_same_on_every_device(device: torch.device) -> None:
    """On weights that are larger than a block of the CPU's index, too."""
    gradients = []
    for where in (torch.device("cpu"), device):
        model = resnet(device).to(where)
        pruner = Pruning(model, {"rules": [RULE]}, example_inputs=batch(device)[0][:1].to(where))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        pruner.channel_regularize(model)
        gradients.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    assert max(one.abs().max() for one in gradients[0].values()) > 0
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-9, msg=name)


ELSEWHERE = {
    "channel": RULE,
    "channel, taylor": {**RULE, "criterion": "taylor"},
    "channel, variance": {**RULE, "criterion": "variance", "regularizer": {"type": "group_lasso"}},
    "2:4": {"pattern": "2:4", "criterion": "snip_momentum", "start": 1, "end": 3, "target": {"sparsity": 0.5}},
    "4x1": {"pattern": "4x1", "regularizer": {"type": "block_lasso"}, "end": 3, "target": {"sparsity": 0.5}},
    "slice": {"pattern": "slice", "regularizer": {"type": "slice_penalty"}, "end": 3, "target": {"sparsity": 0.5}},
    "unstructured": {"pattern": "unstructured", "criterion": "movement", "end": 3, "target": {"sparsity": 0.5}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_model_that_moves_after_its_pruner_was_made(device: torch.device, name: str, dtype: torch.dtype) -> None:
    """To another device, or another dtype; the pruner has seen inputs of the old one only."""
    model = network(device).cpu()
    images, labels = batch(device)
    pruner = Pruning(model, {"rules": [ELSEWHERE[name]]}, example_inputs=images[:1].cpu())
    model.to(device, dtype)
    optimizer = sgd(model.parameters())
    for epoch in range(EPOCHS):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images.to(dtype)), labels) + pruner.slice_regularize(model)
        loss.backward()
        pruner.channel_regularize(model)
        optimizer.step()
        pruner.prune(model, epoch)
    if "target" in ELSEWHERE[name] and "macs" in ELSEWHERE[name]["target"]:
        check_reached(pruner)
    else:
        assert pruner.phase == "finetune"
        assert 0.495 <= pruner.sparsity <= 0.5  # of three input channels there is no window of four
    check_state(model, optimizer, device)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models(device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cpu" and dtype == torch.float16:
        pytest.skip("needs a CUDA device: half-precision training")
    model = network(device).to(dtype)
    images, labels = batch(device)
    optimizer = sgd(model.parameters())
    pruner = Pruning(model, {"rules": [RULE]}, example_inputs=images[:1].to(dtype), optimizer=optimizer)
    for epoch in range(EPOCHS):
        optimizer.zero_grad()
        functional.cross_entropy(model(images.to(dtype)).float(), labels).backward()
        pruner.channel_regularize(model)
        optimizer.step()
        pruner.prune(model, epoch)
    check_reached(pruner)
    check_state(model, optimizer, device)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_distillation_from_a_teacher_on_the_same_device(device: torch.device) -> None:
    model = network(device)
    images, labels = batch(device)
    optimizer = sgd(model.parameters())
    config = {"rules": [RULE], "distillation": {"weight": 1.0}}
    pruner = Pruning(model, config, example_inputs=images[:1], optimizer=optimizer)
    for epoch in range(EPOCHS):
        optimizer.zero_grad()
        outputs = model(images)
        added = pruner.distill_loss(outputs, images)
        assert added.device.type == device.type
        (functional.cross_entropy(outputs, labels) + added).backward()
        optimizer.step()
        pruner.prune(model, epoch)
    check_reached(pruner)
    assert isinstance(pruner.teacher, nn.Module)
    assert {parameter.device.type for parameter in pruner.teacher.parameters()} == {device.type}
