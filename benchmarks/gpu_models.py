"""Parts of benchmarks/gpu.py: second order, 2:4 products, and the latency of pruned models."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torchvision
from common import interleaved
from gpu_setting import Run, Setting, row
from torch import nn
from torch.nn import functional

from pruningawaretraining import Pruning, one_shot, to_semi_structured
from pruningawaretraining.experiment.models import CifarResNet
from pruningawaretraining.runtimes.timing import compare_latency

FAST_CAP_GOAL, SPARSE_GOAL = 1.0, 1.0


# --- second order ---------------------------------------------------------------------------------------------------


def second_order(setting: Setting) -> list[dict[str, Any]]:
    """Reconstruction with least squares in a training, and criteria with a Fisher at once."""
    grads, depth, count = (8, 8, 4) if setting.tiny else (128, 20, 64)
    torch.manual_seed(0)
    model = CifarResNet(depth).to(setting.device)
    data = [(torch.randn(count, 3, 32, 32).to(setting.device), torch.randint(10, (count,)).to(setting.device))] * 2

    def once(name: str, gradients: int) -> Run:
        criterion = {"type": name, "num_grads": gradients}
        rule = {"pattern": "unstructured", "criterion": criterion, "target": {"sparsity": 0.5}}
        return lambda: one_shot(model, rule, data, functional.cross_entropy, [0.5, 0.75])

    once("obs", 4)()  # the libraries of linear algebra start
    times = {name: setting.seconds(once(name, grads)) for name in ("cap", "obs", "fast_cap")}
    network = f"ResNet-{depth}, {grads} gradients, two sparsities at once"
    return [
        _reconstruction(setting),
        row(f"CAP, {network}", times["cap"], "s"),
        row(f"OBS, {network}", times["obs"], "s"),
        row(
            f"FastCAP, {network}", times["fast_cap"] / times["cap"], "of CAP", FAST_CAP_GOAL, seconds=times["fast_cap"]
        ),
    ]


def _reconstruction(setting: Setting) -> dict[str, Any]:
    size, count = (16, 2) if setting.tiny else (64, 32)
    torch.manual_seed(0)
    model = CifarResNet(8) if setting.tiny else torchvision.models.resnet18(weights=None, num_classes=10)
    model = model.to(setting.device)
    images = torch.randn(count, 3, size, size, device=setting.device)
    labels = torch.randint(10, (count,)).to(setting.device)
    rule = {"criterion": "reconstruction", "compensation": "least_squares", "start": 0, "end": 1}
    rules = {"rules": [{**rule, "target": {"macs": 0.5}}]}
    pruner = Pruning(model, rules, example_inputs=images[:1])
    pruner.calibrate_with([(images, labels)] * 4, functional.cross_entropy)
    times = [setting.seconds(partial(pruner.prune, model, epoch)) for epoch in range(2)]
    network = "ResNet-8" if setting.tiny else "resnet18"
    what = f"two events of reconstruction with least squares, {network}, {size} px"
    return row(what, sum(times), "s", first_s=times[0], second_s=times[1], MACs=pruner.macs.fraction)


# --- inference ------------------------------------------------------------------------------------------------------


def semi_structured(setting: Setting) -> list[dict[str, Any]]:
    """Two layers of 4096 x 4096 whose weights are 2:4, in half precision, on 4096 rows."""
    width = 256 if setting.tiny else 4096
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)).to(setting.device)
    rule = {"pattern": "2:4", "criterion": "magnitude", "target": {"sparsity": 0.5}}
    Pruning(model, {"rules": [rule]}).prune(model, 0)
    if setting.device.type != "cuda":
        return [row("2:4 layers", 1.0, "times faster", None, tiny="a CPU has no sparse products")]
    dense = model.half().eval()
    sparse = copy.deepcopy(dense)
    inputs = torch.randn(width, width, device=setting.device, dtype=torch.float16)
    with torch.no_grad():
        chosen = to_semi_structured(sparse, example_inputs=inputs)
        expected, found = dense(inputs), sparse(inputs)
        times = interleaved(
            {"dense": setting.waited(lambda: dense(inputs)), "sparse": setting.waited(lambda: sparse(inputs))}, 30, 5
        )
    error = float((found - expected).abs().max() / expected.abs().max())
    beside = {"dense_ms": 1e3 * times["dense"], "error": error, "layers": "; ".join(map(str, chosen.layers))}
    speed = times["dense"] / times["sparse"]
    return [row(f"2:4 layers, {width} x {width} x {width}, half", speed, "times faster", SPARSE_GOAL, **beside)]


def latency(setting: Setting) -> list[dict[str, Any]]:
    """A model at half of its MACs beside the dense one, on the runtimes of a GPU."""
    size, count = (32, 2) if setting.tiny else (224, 64)
    torch.manual_seed(0)
    dense = torchvision.models.resnet18(weights=None, num_classes=10).to(setting.device)
    images = torch.randn(count, 3, size, size, device=setting.device)
    pruned = copy.deepcopy(dense)
    rules = {"rules": [{"criterion": "magnitude", "multiple": 8, "target": {"macs": 0.5}}]}
    pruner = Pruning(pruned, rules, example_inputs=images[:1])
    pruner.prune(pruned, 0)
    models = {"dense": (dense.eval(), images), "pruned": (pruned.eval(), images)}
    rows = []
    for runtime in ("cuda", "torch_compile") if setting.device.type == "cuda" else ("torch",):
        found = compare_latency(models, runtime, repeats=3 if setting.tiny else 50)
        milliseconds = {name: one.median_ms for name, one in found.latencies.items()}
        what = f"{runtime}, resnet18 at half of its MACs, {size} px, batch {count}"
        beside = {"dense_ms": milliseconds["dense"], "pruned_ms": milliseconds["pruned"], "MACs": pruner.macs.fraction}
        rows.append(row(what, found.ratios["pruned"], "of the dense time", None, **beside))
    return rows
