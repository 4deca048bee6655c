"""No step hook waits for the GPU: every pattern, regulariser, listening criterion and proximal map, after an event.

On the CPU there is nothing to wait for, and the same steps run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ranks_worker
import torch
from gpu_training import EPOCHS, RULE, Loop, SmallNet, batch, network, sgd
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Pruning
from pruningawaretraining.criteria.base import collector_of
from pruningawaretraining.proximal import PruneOptimizer
from pruningawaretraining.registry import build, names

SPAN = {"start": 0, "end": 5, "schedule": "linear", "target": {"sparsity": 0.5}}
Built = tuple[nn.Module, Tensor]


@contextmanager
def no_sync(device: torch.device) -> Iterator[None]:
    """Inside the block an operation that makes the host wait for the GPU is an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def convolutions(device: torch.device) -> Built:
    return network(device), batch(device)[0]


def small(device: torch.device) -> Built:
    return SmallNet().to(device), batch(device)[0]


def attention(device: torch.device) -> Built:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2).to(device), torch.randn(2, 5, 32).to(device)


def residual(device: torch.device) -> Built:
    return ranks_worker.residual_network().to(device), ranks_worker.batch(0)[0].to(device)


def check_steps(device: torch.device, made: Built, rule: dict[str, Any], extra: dict[str, Any] | None = None) -> None:
    """Some epochs, so that there are masks and everything has been allocated; then steps that may not wait."""
    model, inputs = made
    optimizer = sgd(model.parameters())
    pruner = Pruning(model, {"rules": [rule], **(extra or {})}, example_inputs=inputs[:1], optimizer=optimizer)

    def step() -> None:
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = outputs.square().mean() + pruner.slice_regularize(model) + pruner.distill_loss(outputs, inputs)
        loss.backward()
        pruner.channel_regularize(model)
        pruner.on_before_optimizer_step()
        optimizer.step()
        pruner.on_after_optimizer_step()

    for epoch in range(3):
        step()
        pruner.prune(model, epoch)
    step()
    assert pruner.phase == "prune"
    assert 0 < pruner.sparsity < 0.5
    with no_sync(device):
        step()
        step()


PATTERNS: dict[str, tuple[Callable[[torch.device], Built], Any]] = {
    "channel": (convolutions, "channel"),
    "head": (attention, "head"),
    "depth": (residual, "depth"),
    "slice": (convolutions, "slice"),
    "block": (convolutions, "4x1"),
    "n_of_m": (convolutions, "2:4"),
    "unstructured": (convolutions, "unstructured"),
}
REGULARIZERS = {
    "growing_l2": "channel",
    "group_lasso": "channel",
    "bn_scale": "channel",
    "block_lasso": "4x1",
    "slice_penalty": "slice",
}
LISTENING = [name for name in names("criterion") if collector_of(build("criterion", name)) is not None]
CHANNELS_ONLY = ("reconstruction",)


def test_the_tables_have_everything_that_is_registered() -> None:
    assert set(PATTERNS) == set(names("pattern"))
    assert set(REGULARIZERS) == set(names("regularizer"))
    assert set(MAPS) == set(names("prox"))


@pytest.mark.parametrize("name", PATTERNS)
def test_masks_of(device: torch.device, name: str) -> None:
    make, pattern = PATTERNS[name]
    criterion = {"depth": "magnitude", "head": "magnitude"}.get(name, "weight")
    check_steps(device, make(device), {**SPAN, "pattern": pattern, "criterion": criterion, "scope": "local"})


@pytest.mark.parametrize("name", REGULARIZERS)
def test_regulariser(device: torch.device, name: str) -> None:
    rule = {**SPAN, "pattern": REGULARIZERS[name], "regularizer": {"type": name, "strength": 1e-3}}
    check_steps(device, convolutions(device), rule)


@pytest.mark.parametrize("pattern", ["channel", "2:4", "unstructured"])
@pytest.mark.parametrize("name", LISTENING)
def test_criterion_that_listens(device: torch.device, name: str, pattern: str) -> None:
    made = small(device)
    if name == "block_change":
        if pattern != "channel":
            pytest.skip("block_change is of whole blocks")
        made, pattern = residual(device), "depth"
    if name in CHANNELS_ONLY and pattern != "channel":
        pytest.skip(f"{name} is of channels")
    spec = {"type": name, "rearranged": False} if name == "retrain_free" else name  # that is of events, on the host
    check_steps(device, made, {**SPAN, "pattern": pattern, "criterion": spec, "scope": "local"})


def test_distillation(device: torch.device) -> None:
    made = convolutions(device)
    feature = "layer1" if device.type == "cuda" else "down"
    check_steps(device, made, RULE | {"end": 9}, {"distillation": {"weight": 1.0, "features": [feature]}})


def test_a_scaler_that_a_fused_optimizer_reads_itself(cuda: torch.device) -> None:
    """The scale and what overflowed stay on the GPU: also what counts the steps may not look at them."""
    model, images = convolutions(cuda)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    pruner = Pruning(model, {"rules": [{**RULE, "end": 9}]}, example_inputs=images[:1], optimizer=optimizer)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    loop = Loop(model, pruner, optimizer, torch.float16, scaler)
    inputs = batch(cuda)
    for epoch in range(3):
        loop.step(*inputs)
        scaler.update()
        pruner.prune(model, epoch)
    loop.step(*inputs)
    scaler.update()
    with no_sync(cuda):
        loop.step(*inputs)
        scaler.update()
    assert pruner.steps == 5


ROWS = {"group_type": "Dim0Grouper"}
HALF = {"min_sparsity": 0.5}
MAPS: dict[str, dict[str, Any]] = {
    "ProxLasso": {"group_type": "ElemGrouper", "reg_lambda": 2e-4},
    "ProxGroupLasso": {**ROWS, "reg_lambda": 2e-4},
    "MinSparsityConstraint": {**ROWS, **HALF},
    "GlobalMinSparsityConstraint": {**ROWS, **HALF},
    "NMSparseConstraint": {"group_type": "KElementGrouper", "k": 4, "n_nonzero": 2},
    "ProxNuclearNorm": {"group_type": "SVDGrouper", "reg_lambda": 2e-4},
    "MinRankConstraint": {"group_type": "SVDGrouper", **HALF},
}
SPECTRAL = ("ProxNuclearNorm", "MinRankConstraint")
"""torch.linalg.svd itself waits for the GPU."""


@pytest.mark.parametrize("name", MAPS)
def test_proximal_step(device: torch.device, name: str) -> None:
    model, images = convolutions(device)
    labels = batch(device)[1]
    kind = nn.Linear if name in SPECTRAL else nn.Conv2d
    weights = [one.weight for one in model.modules() if type(one) is kind and one.weight[0].numel() % 4 == 0]
    chosen = {id(one) for one in weights}
    others = {"params": [one for one in model.parameters() if id(one) not in chosen]}
    groups = [{"params": weights, "prox_type": name, **MAPS[name]}, others]
    optimizer = PruneOptimizer(torch.optim.SGD(groups, 0.01, momentum=0.9))

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    for _ in range(EPOCHS):
        step()
    if name not in SPECTRAL:
        with no_sync(device):
            step()
    assert all(bool(torch.isfinite(one).all()) for one in weights)
    if "min_sparsity" in MAPS[name] and name not in SPECTRAL:
        rows = torch.cat([(one.detach().flatten(1) == 0).all(1) for one in weights])
        assert float(rows.double().mean()) == pytest.approx(0.5, abs=0.01)
