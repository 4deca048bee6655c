"""The laws for every dynamic on every pattern: exact zeros wherever a model is read, resumption, living optimizers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from fake_device import Watch
from test_fake_device import on_the_gpu
from test_state import assert_same, begin, resume, seed_everything, through_a_file, train
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from pruningawaretraining import Pruning, load_pruned, save_pruned
from pruningawaretraining.config.options import type_of
from pruningawaretraining.engine.dynamics import state_of_dynamic
from pruningawaretraining.masks.masks import Masks
from pruningawaretraining.registry import lookup, names

PATTERNS: dict[str, Any] = {
    "channel": "channel",
    "slice": {"type": "slice", "block_size": 4},
    "block": "4x1",
    "n_of_m": "2:4",
    "unstructured": "unstructured",
}
DYNAMICS: dict[str, Any] = {
    "frozen": "frozen",
    "straight_through": {"type": "straight_through", "refresh": 2, "decay": 1e-2},
    "regrow": {"type": "regrow", "layers": "uniform"},
    "alternate": "alternate",
    "soft": {"type": "soft", "steps": 2},
    "rewind": {"type": "rewind", "to": 1},
}


def supported(dynamic: str, pattern: str) -> bool:
    entry = lookup("dynamic", dynamic)
    return bool(entry.removable if pattern == "channel" else entry.windows or pattern != "n_of_m")


PAIRS = [pair for pair in itertools.product(DYNAMICS, PATTERNS) if supported(*pair)]
ALL = pytest.mark.parametrize(("dynamic", "pattern"), PAIRS)
EVENTS, EPOCHS = 4, 7


def config(dynamic: str, pattern: str, **options: Any) -> dict[str, Any]:
    rule = {
        "pattern": PATTERNS[pattern],
        "dynamic": DYNAMICS[dynamic],
        "target": {"sparsity": 0.5},
        "start": 1,
        "end": EVENTS,
        "scope": "local",
        "max_sparsity": 0.8,
    }
    return {"rules": [{**rule, **options}]}


def test_every_dynamic_is_tried() -> None:
    assert set(names("dynamic")) == set(DYNAMICS)
    assert {type_of("pattern", spec) for spec in PATTERNS.values()} == set(PATTERNS)


def masked_values(model: nn.Module, masks: Masks) -> Iterator[tuple[str, Tensor]]:
    """What the masked entries of a model with the names of the masks' grouping hold."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for member, keep_W in masks.grouping.expand(masks.keep_G.float().cpu(), 1.0):
        yield member.name, tensors[member.name].detach()[(keep_W == 0).expand(member.parameter.shape)]


def check_zeros(model: nn.Module, pruner: Pruning) -> int:
    masked = 0
    for masks in pruner.engine.masks:
        for name, values in masked_values(model, masks):
            assert bool((values == 0).all()), name
            masked += len(values)
    return masked


@ALL
def test_a_masked_weight_is_0_wherever_the_model_is_read(dynamic: str, pattern: str, tmp_path: Path) -> None:
    run = begin(config(dynamic, pattern))
    model, _, pruner = run
    masked = 0
    for epoch in range(EPOCHS - 1):
        train(run, epoch, epoch + 1)
        masked += check_zeros(model, pruner)
        saved = copy.deepcopy(model)
        saved.load_state_dict(model.state_dict())
        check_zeros(saved, pruner)
    assert masked and pruner.sparsity > 0
    pruner.on_train_end()
    train(run, EPOCHS - 1, EPOCHS)
    before = pruner.sparsity
    assert pattern == "channel" or check_zeros(model, pruner)
    assert dynamic in ("soft", "regrow") or before == pytest.approx(0.5, abs=0.1)
    save_pruned(model, tmp_path / "pruned.safetensors")
    loaded = load_pruned(zoo.architecture("groupnorm")[0], tmp_path / "pruned.safetensors")
    inputs = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(loaded.eval()(inputs), model.eval()(inputs), rtol=0, atol=1e-6)


@ALL
@pytest.mark.parametrize("stop", [2, 3])
def test_interrupted_equals_uninterrupted(dynamic: str, pattern: str, stop: int, tmp_path: Path) -> None:
    chosen = config(dynamic, pattern)
    seed_everything()
    straight = begin(chosen)
    train(straight, 0, EPOCHS)
    seed_everything()
    broken = begin(chosen)
    train(broken, 0, stop)
    states = through_a_file([part.state_dict() for part in broken], tmp_path)
    train(broken, stop, EPOCHS)
    run = resume(chosen, states)
    train(run, stop, EPOCHS)
    assert_same(run, straight)


@ALL
def test_the_optimizer_lives_on(dynamic: str, pattern: str) -> None:
    """Every parameter of the model is in it after whatever has been removed, and masked ones have no momentum."""
    run = begin(config(dynamic, pattern))
    train(run, 0, EPOCHS)
    model, optimizer, pruner = run
    held = {id(one) for group in optimizer.param_groups for one in group["params"]}
    assert {id(one) for one in model.parameters()} == held
    for parameter in model.parameters():
        assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape
    if pattern == "channel":
        assert pruner.channel_pruner.removed


@ALL
def test_nothing_waits_for_the_gpu_in_a_step(dynamic: str, pattern: str) -> None:
    changed = {"soft": {"type": "soft", "steps": 100}, "straight_through": {"type": "straight_through", "refresh": 1}}
    spec = changed.get(dynamic, DYNAMICS[dynamic])
    steps = 1 if dynamic in ("regrow", "alternate") else 2
    with on_the_gpu(pattern, dynamic=spec, steps=steps) as run, Watch() as watch:
        for _ in range(4):
            run.gradients()
            run.step()
    assert watch.launches


def test_a_channel_rule_before_one_that_trains_masked_weights() -> None:
    """Channels are removed; the rule inside layers goes on, at its sparsity, on what is left."""
    rules = [
        {"target": {"sparsity": 0.3}, "start": 1, "end": 2},
        {
            **config("straight_through", "unstructured")["rules"][0],
            "start": 2,
        },
    ]
    run = begin({"rules": rules})
    train(run, 0, EPOCHS)
    model, _, pruner = run
    assert pruner.channel_pruner.removed and check_zeros(model, pruner)
    assert pruner.engine.weights.rules[0].sparsity == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("dynamic", ["straight_through", "regrow"])
def test_gradients_scaled_by_a_scaler_train_alike(dynamic: str) -> None:
    """AMP's loss scale is divided out before dense weights move, and a skipped step changes nothing."""
    found = []
    for scale in (None, 2.0**4):
        run = begin(config(dynamic, "unstructured"))
        model, optimizer, pruner = run
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None, growth_interval=1000)
        seed_everything()
        for epoch in range(EPOCHS):
            inputs = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(epoch))
            if scale and epoch == 3:  # an overflow
                optimizer.zero_grad()
                scaler.scale(model.eval()(inputs).square().mean() * torch.inf).backward()
                scaler.step(optimizer)
                scaler.update(scale)
            optimizer.zero_grad()
            scaler.scale(model.eval()(inputs).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            pruner.prune(model, epoch)
        found.append(model)
    for (name, plain), scaled in zip(found[0].named_parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(plain, scaled, rtol=1e-4, atol=1e-6, msg=name)


@ALL
def test_a_dynamic_follows_layers_that_are_exchanged(dynamic: str, pattern: str) -> None:
    """Dense values, counted steps and the way to the next masks stay when ``assign=True`` puts other parameters in."""
    model, _, pruner = run = begin(config(dynamic, pattern))
    train(run, 0, 3)
    domain = pruner.engine.coupled if pattern == "channel" else pruner.engine.weights
    (one,) = domain.rules

    def masks() -> Masks:
        return domain.masks if pattern == "channel" else one.masks

    before, known = masks(), copy.deepcopy(state_of_dynamic(masks()))
    assert before.active or dynamic in ("soft", "alternate")
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    pruner.apply_masks()
    assert masks() is not before and type(masks().dynamic) is type(before.dynamic)
    assert masks().passing == before.passing and (masks().choose is None) == (before.choose is None)
    now, specs = zip(*(tree_flatten(state) for state in (state_of_dynamic(masks()), known)), strict=True)
    assert specs[0] == specs[1]
    for mine, theirs in zip(*now, strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs
    if masks().active:
        assert check_zeros(model, pruner)


def test_an_average_sees_masked_weights_only() -> None:
    """After many equal updates an average of the weights has zeros where the model has them."""
    model, _, pruner = run = begin(config("straight_through", "unstructured", start=0, end=0))
    train(run, 0, 1)
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        average.update_parameters(model)
    assert check_zeros(average.module, pruner)


def test_compiled_models_train_alike() -> None:
    """Dense values come and go in place: a compiled model sees the same weights."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        pruner = Pruning(model, config("straight_through", "unstructured"), optimizer=optimizer)
        called = torch.compile(model, backend="eager") if compiled else model
        for epoch in range(EPOCHS):
            optimizer.zero_grad()
            called(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
            pruner.prune(model, epoch)
        found.append(model)
    for plain, other in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(plain, other)
    torch.compiler.reset()
