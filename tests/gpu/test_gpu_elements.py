"""Slices, blocks, N:M and single weights on a GPU: exact counts, the same choice as on the CPU, sparse products."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from gpu_training import batch, check_zeros_hold, network, sgd, zero_fraction, zeros_of
from torch import nn
from torch.nn import functional

from pruningawaretraining import Pruning, one_shot, to_semi_structured
from pruningawaretraining.experiment.models import CifarResNet

SPAN = {"start": 0, "end": 2, "target": {"sparsity": 0.5}}
SLICE = {"type": "slice", "block_size": 8, "types": ["Linear", "Conv"]}
CASES: dict[str, dict[str, Any]] = {
    "unstructured": {"pattern": "unstructured", "criterion": "magnitude"},
    "unstructured, movement": {"pattern": "unstructured", "criterion": "movement"},
    "unstructured, local": {"pattern": "unstructured", "criterion": "weight", "scope": "local"},
    "2:4": {"pattern": "2:4", "criterion": "magnitude"},
    "2:4, snip_momentum": {"pattern": "2:4", "criterion": "snip_momentum"},
    "4x1, snip": {"pattern": "4x1", "criterion": "snip"},
    "slice": {"pattern": {"type": "slice", "block_size": 8}, "criterion": "magnitude"},
    "wanda": {"pattern": "unstructured", "criterion": "wanda"},
}


@pytest.mark.parametrize("name", CASES)
def test_counts_are_exact_and_zeros_hold(device: torch.device, name: str) -> None:
    model = network(device)
    optimizer = sgd(model.parameters())
    images, labels = batch(device)
    pruner = Pruning(model, {"rules": [{**CASES[name], **SPAN}]}, example_inputs=images[:1], optimizer=optimizer)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    for epoch in range(3):
        step()
        pruner.prune(model, epoch)
    assert pruner.phase == "finetune"
    assert 0.495 <= pruner.sparsity <= 0.5  # of three input channels there is no window of four
    zeros = zeros_of(model)
    for _ in range(3):
        step()
    check_zeros_hold(model, {key: one for key, one in zeros.items() if f"{key}" in pruner.masks})


def masks_on(model: nn.Module, device: torch.device, pattern: Any, sparsity: float) -> dict[str, torch.Tensor]:
    """What one event of magnitude keeps; the weights are on the device."""
    twin = copy.deepcopy(model).to(device)
    rule = {"pattern": pattern, "criterion": "weight", "target": {"sparsity": sparsity}}
    pruner = Pruning(twin, {"rules": [rule]})
    pruner.prune(twin, 0)
    assert abs(zero_fraction(twin) - sparsity) < 1e-3
    return {name: keep.cpu() for name, keep in pruner.masks.items()}


@pytest.mark.parametrize(
    ("pattern", "sparsity", "rounding"),
    [("unstructured", 0.9, 0), ("2:4", 0.5, 0), ("4x1", 0.9, 8), (SLICE, 0.5, 8)],
    ids=["unstructured", "2:4", "4x1", "slice"],
)
def test_the_gpu_keeps_what_the_cpu_keeps(device: torch.device, pattern: Any, sparsity: float, rounding: int) -> None:
    """Of single weights exactly; sums over a block may be rounded another way, and change places in the ranking."""
    width = 1024 if device.type == "cuda" else 128
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(4)))
    here = masks_on(model, torch.device("cpu"), pattern, sparsity)
    there = masks_on(model, device, pattern, sparsity)
    assert here.keys() == there.keys()
    assert sum(int((here[name] != there[name]).sum()) for name in here) <= rounding


def test_ties_are_counted_exactly(device: torch.device) -> None:
    """Weights of a few values: a threshold alone would take too many or too few."""
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False)).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(1, 5, parameter.shape).to(parameter))
    rule = {"pattern": "unstructured", "criterion": "weight", "target": {"sparsity": 0.3}}
    Pruning(model, {"rules": [rule]}).prune(model, 0)
    assert sum(int((parameter == 0).sum()) for parameter in model.parameters()) == int(0.3 * 2 * 256 * 256)


SECOND_ORDER: dict[str, Any] = {
    "cap": {"type": "cap", "num_grads": 128, "micro_batch": 1},
    "obs": {"type": "obs", "num_grads": 128, "micro_batch": 1},
    "fast_cap": {"type": "fast_cap", "num_grads": 64},
    "sparse_gpt": {"type": "sparse_gpt", "num_grads": 64},
}


def images_and_labels(device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    count = 64 if device.type == "cuda" else 8
    return [(torch.randn(count, 3, 32, 32).to(device), torch.randint(10, (count,)).to(device)) for _ in range(2)]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("name", SECOND_ORDER)
def test_second_order_at_once(device: torch.device, name: str, pattern: str) -> None:
    on_gpu = device.type == "cuda"
    criterion = SECOND_ORDER[name] if on_gpu else {**SECOND_ORDER[name], "num_grads": 8}
    model = CifarResNet(20 if on_gpu else 8).to(device)
    levels = [0.5] if pattern == "2:4" else [0.5, 0.75]
    rule = {"pattern": pattern, "criterion": criterion, "target": {"sparsity": 0.5}}
    before = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    found = one_shot(model, rule, images_and_labels(device), functional.cross_entropy, levels)
    if on_gpu and name in ("cap", "obs"):
        fisher = 50 * sum(p.numel() for p in model.parameters() if p.dim() > 1) * 4
        assert torch.cuda.max_memory_allocated() - before >= fisher / 2, "the Fisher is not where the weights are"
    for sparsity, pruned in found.items():
        assert {parameter.device.type for parameter in pruned.parameters()} == {device.type}
        assert all(bool(torch.isfinite(parameter).all()) for parameter in pruned.parameters())
        assert abs(zero_fraction(pruned) - sparsity) < 5e-3


@pytest.mark.parametrize("criterion", ["reconstruction", "magnitude"])
def test_channels_whose_readers_make_up_for_them(device: torch.device, criterion: str) -> None:
    """Least squares at every event of a training."""
    model = network(device)
    optimizer = sgd(model.parameters())
    images, labels = batch(device)
    rule = {"criterion": criterion, "compensation": "least_squares", "start": 0, "end": 2, "target": {"macs": 0.5}}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=images[:1], optimizer=optimizer)
    pruner.calibrate_with([(images, labels)] * 2, functional.cross_entropy)
    for epoch in range(4):
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        pruner.prune(model, epoch)
    assert pruner.phase == "finetune"
    assert 0.49 <= pruner.macs.fraction <= 0.5
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_semi_structured_layers_compute_the_same(cuda: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    """Layers that are faster so become sparse; the others stay dense and are named in the log."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a CUDA device of capability 8.0")
    model = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))
    model.to(cuda)
    rule = {"pattern": "2:4", "layers": ["0", "2"], "criterion": "magnitude", "target": {"sparsity": 0.5}}
    Pruning(model, {"rules": [rule]}).prune(model, 0)
    model.half().eval()
    inputs = torch.randn(1024, 4096, device=cuda, dtype=torch.float16)
    with torch.no_grad():
        expected = model(inputs)
        with caplog.at_level(logging.INFO):
            names = list(to_semi_structured(model, example_inputs=inputs))
        found = model(inputs)
    assert set(names) <= {"0", "2"}
    for name in ("0", "2"):
        weight = model.get_submodule(name).weight
        is_sparse = type(weight.data).__name__.startswith("SparseSemiStructured")
        assert is_sparse == (name in names)
        assert is_sparse or f"{name} stays dense" in caplog.text
    assert "4 stays dense" in caplog.text
    assert float((found - expected).abs().max()) <= 1e-2 * float(expected.abs().max())
