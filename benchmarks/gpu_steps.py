"""Parts of benchmarks/gpu.py: what a training step, an event and a proximal step cost."""

from __future__ import annotations

import copy
import statistics
import warnings
from functools import partial
from typing import Any

import proximal
import torch
import torchvision
from common import add_penalties, interleaved
from gpu_setting import Run, Setting, row
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Pruning

RULE: dict[str, Any] = {
    "criterion": "magnitude",
    "regularizer": {"type": "growing_l2", "strength": 1e-3},
    "start": 0,
    "end": 20,
    "target": {"macs": 0.3},
}
STEP_GOAL, EVENT_GOAL_MS, PROXIMAL_GOAL = 1.03, 30.0, 1.6


# --- training steps -------------------------------------------------------------------------------------------------


def _trained(name: str, setting: Setting, size: int, count: int) -> tuple[nn.Module, torch.optim.Optimizer, Run]:
    """A model, its optimizer and one step of its training in bfloat16 on a fixed batch."""
    torch.manual_seed(0)
    model: nn.Module = getattr(torchvision.models, name)(weights=None, num_classes=10)
    model = model.to(setting.device, memory_format=torch.channels_last)
    images = torch.randn(count, 3, size, size).to(setting.device, memory_format=torch.channels_last)
    labels = torch.randint(10, (count,)).to(setting.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(setting.device.type, torch.bfloat16):
            loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return model, optimizer, step


def training_steps(setting: Setting) -> list[dict[str, Any]]:
    """Masks and the growing regulariser in a training step, beside the same step without a pruner."""
    cases = {"resnet50": (224, 64), "mobilenet_v2": (224, 64), "resnet18": (224, 64)}
    if setting.tiny:
        cases = {"resnet18": (32, 2)}
    return [one for name, (size, count) in cases.items() for one in _steps_of(name, setting, size, count)]


def _steps_of(name: str, setting: Setting, size: int, count: int) -> list[dict[str, Any]]:
    _, _, bare = _trained(name, setting, size, count)
    model, optimizer, step = _trained(name, setting, size, count)
    example = torch.randn(1, 3, size, size, device=setting.device)
    pruner = Pruning(model, {"rules": [RULE]}, example_inputs=example, optimizer=optimizer)
    for epoch in range(4):
        step()
        pruner.prune(model, epoch)
    rounds = 2 if setting.tiny else 30
    times = interleaved({"bare": setting.waited(bare), "ours": setting.waited(step)}, rounds, warmup=rounds // 5 + 1)
    engine = pruner.channel_pruner
    parts = {
        "regulariser_ms": setting.milliseconds(lambda: add_penalties(pruner.engine)),
        "masks_ms": setting.milliseconds(engine.masks.apply),
        "Torch-Pruning's_regulariser_ms": _peer(name, setting, example),
    }
    goal = STEP_GOAL if name == "resnet50" else None
    what = f"bf16 step with masks and regulariser, {name}, {size} px, batch {count}"
    ratio = times["ours"] / times["bare"]
    return [row(what, ratio, "of the bare step", goal, bare_step_ms=1e3 * times["bare"], **parts)]


def _peer(name: str, setting: Setting, example: Tensor) -> Any:
    """Milliseconds of Torch-Pruning's regulariser on the same network, or why there are none."""
    try:
        import torch_pruning as tp
    except ImportError:
        return "not installed"
    torch.manual_seed(0)
    model: nn.Module = getattr(torchvision.models, name)(weights=None, num_classes=10).to(setting.device)
    options: dict[str, Any] = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}
    heads = [one for one in model.modules() if isinstance(one, nn.Linear)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importance = tp.importance.GroupMagnitudeImportance()
        theirs = tp.pruner.GroupNormPruner(
            model, (example,), importance=importance, reg=1e-3, ignored_layers=heads, **options
        )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return setting.milliseconds(lambda: theirs.regularize(model), 5)


# --- events ---------------------------------------------------------------------------------------------------------


def events(setting: Setting) -> list[dict[str, Any]]:
    """One event of a schedule at 94 million weights: scores, ranking and masks."""
    width, layers = (128, 4) if setting.tiny else (3072, 10)
    torch.manual_seed(0)
    stack = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).to(setting.device)
    return [
        _event_of(pattern, sparsity, copy.deepcopy(stack), setting)
        for pattern, sparsity in (("unstructured", 0.9), ("2:4", 0.5), ("4x1", 0.9))
    ]


def _event_of(pattern: str, sparsity: float, model: nn.Sequential, setting: Setting) -> dict[str, Any]:
    inputs = torch.randn(8, model[0].in_features, device=setting.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    rule = {"pattern": pattern, "criterion": "magnitude", "start": 0, "end": 20, "target": {"sparsity": sparsity}}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=inputs[:1], optimizer=optimizer)
    model(inputs).sum().backward()
    optimizer.step()
    times = [1e3 * setting.seconds(partial(pruner.prune, model, epoch)) for epoch in range(7)]
    millions = sum(layer.weight.numel() for layer in model) / 1e6
    beside = {"first_event_ms": times[0], "masked_SGD_step_ms": setting.milliseconds(optimizer.step)}
    what = f"event of {pattern}, {millions:.3g} million weights"
    return row(what, statistics.median(times[1:]), "ms", EVENT_GOAL_MS, **beside)


# --- proximal steps -------------------------------------------------------------------------------------------------


def proximal_steps(setting: Setting) -> list[dict[str, Any]]:
    """A step of PruneOptimizer on ResNet-50's weights beside the bare step of the SGD in it, and beside torchao's."""
    rows = []
    for name, sgd in (("rows, group lasso", "fused"), (proximal.DEFAULT, "foreach")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            functions = proximal.case_functions(name, setting.device, proximal.peer())
            times = interleaved(functions, 1 if setting.tiny else 20, 1 if setting.tiny else 5)
        theirs = 1e3 * times["torchao"] if "torchao" in times else "not installed"
        beside = {"bare_ms": 1e3 * times["bare"], "ours_ms": 1e3 * times["ours"], "torchao_ms": theirs}
        what = f"proximal step, rows, group lasso, {sgd} SGD, resnet50's weights"
        rows.append(row(what, times["ours"] / times["bare"], "of bare SGD", PROXIMAL_GOAL, **beside))
    return rows
