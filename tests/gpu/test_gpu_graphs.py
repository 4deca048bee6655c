"""torch.compile and CUDA graphs: masks hold, weights move, and a removed model is compiled anew."""

from __future__ import annotations

from collections.abc import Iterator

import law_checks
import pytest
import torch
from gpu_training import EPOCHS, RULE, SmallNet, batch, check_reached, check_state, resnet, sgd
from torch import Tensor
from torch.nn import functional

from pruningawaretraining import Pruning


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(device: torch.device, mode: str) -> None:
    """On the CPU the graphs are traced, and not made into kernels."""
    if device.type == "cuda":
        pytest.importorskip("triton")
    elif mode != "default":
        pytest.skip("needs a CUDA device")
    model = SmallNet().to(device)
    images, labels = batch(device)
    optimizer = sgd(model.parameters())
    options = {"mode": mode} if device.type == "cuda" else {"backend": "aot_eager"}
    compiled = torch.compile(model, dynamic=False, **options)
    pruner = Pruning(compiled, {"rules": [RULE]}, example_inputs=images[:1], optimizer=optimizer)
    masked = 0
    for epoch in range(EPOCHS):
        for _ in range(2):
            torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            functional.cross_entropy(compiled(images), labels).backward()
            pruner.channel_regularize(compiled)
            optimizer.step()
            masked += law_checks.check_masked_channels(pruner)
        pruner.prune(compiled, epoch)
    assert masked > 0
    check_reached(pruner)
    check_state(model, optimizer, device)
    with torch.no_grad():
        torch.compiler.cudagraph_mark_step_begin()
        expected = model(images).clone()
        torch.testing.assert_close(compiled(images), expected, rtol=2e-2, atol=2e-2)


def test_a_captured_step_is_replayed(cuda: torch.device) -> None:
    """Forward, backward, regulariser, the optimizer's step and the masks in one CUDA graph: nothing may wait in it."""
    model = resnet(cuda)
    images, labels = batch(cuda)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, capturable=True)
    rule = {**RULE, "start": 0, "end": 20, "target": {"macs": 0.3}}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=images[:1], optimizer=optimizer)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        pruner.channel_regularize(model)
        optimizer.step()
        return loss

    for epoch in range(4):
        step()
        pruner.prune(model, epoch)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    masked = law_checks.check_masked_channels(pruner)
    assert masked > 0
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    graph.replay()
    first = float(loss.detach())
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    assert law_checks.check_masked_channels(pruner) == masked
    assert all(bool((p.detach() != before[name]).any()) for name, p in model.named_parameters() if p.dim() > 1)
    assert float(loss.detach()) < first, "the replayed steps learn the batch"


def test_a_captured_step_has_the_regulariser_in_it(cuda: torch.device) -> None:
    """With gradients of 0 only the penalty moves the weights: every replay makes each kept weight smaller."""
    model = resnet(cuda)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1, device=cuda), fused=True)
    rule = {**RULE, "regularizer": {"type": "growing_l2", "strength": 0.1}, "start": 5, "end": 9}
    images, _ = batch(cuda)
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=images[:1], optimizer=optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        pruner.channel_regularize(model)
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    sizes = []
    for _ in range(3):
        graph.replay()
        sizes.append(float(model.layer4[0].conv1.weight.detach().norm()))
    assert sizes[0] > sizes[1] > sizes[2] > 0
