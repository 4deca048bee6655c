"""A step of PruneOptimizer beside the bare base optimizer and beside torchao's PAT, on the weights of ResNet-50.

Ratios to the bare step of the fastest SGD that PyTorch has (fused, with momentum and weight decay), medians of
interleaved rounds; on one thread of a CPU its own time is counted, which other processes disturb least. The second
table counts what can be removed when half of the rows of every layer, or half of the coupled channels, are 0.

    pip install torchao           # optional: the column of the peer is empty without it
    python benchmarks/proximal.py [--rounds 15] [--threads 1] [--device cpu] [--only CASE] [--removable-only]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import torchvision
from common import environment, interleaved, markdown, save
from torch import Tensor, nn

from pruningawaretraining.proximal import CoupledChannelGrouper, PruneOptimizer

Groups = list[dict[str, Any]]
LASSO = {"prox_type": "ProxGroupLasso", "reg_lambda": 2e-4}
CASES: dict[str, dict[str, Any]] = {
    "rows, group lasso": {"group_type": "Dim0Grouper", **LASSO},
    "2:4": {"group_type": "KElementGrouper", "k": 4, "prox_type": "NMSparseConstraint", "n_nonzero": 2},
    "elements, lasso": {"group_type": "ElemGrouper", "prox_type": "ProxLasso", "reg_lambda": 2e-4},
    "rows, half of them": {"group_type": "Dim0Grouper", "prox_type": "MinSparsityConstraint", "min_sparsity": 0.5},
}
DEFAULT = "rows, group lasso, over SGD that is not fused"
HEALING = "rows, group lasso, healing"
COUPLED = "coupled channels, group lasso"
SLOW = 2.0
"""A case with a step of more seconds gets three rounds."""
PEER_MODULE = "torchao.prototype.pat.optim"


def peer() -> type[torch.optim.Optimizer] | None:
    """torchao's optimizer, if it is installed and has one."""
    if importlib.util.find_spec("torchao") is None:
        return None
    try:
        found: type[torch.optim.Optimizer] = importlib.import_module(PEER_MODULE).PruneOptimizer
    except (ImportError, AttributeError):
        return None
    return found


def model_on(device: torch.device) -> nn.Module:
    """ResNet-50 with gradients of the size of real ones."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.resnet50(weights=None).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return model


def weights_of(model: nn.Module) -> list[Tensor]:
    """The 54 weights of convolutions and the classifier."""
    return [parameter for parameter in model.parameters() if parameter.dim() > 1]


def sgd(groups: Groups, fused: bool = True) -> torch.optim.SGD:
    """The base optimizer."""
    return torch.optim.SGD(groups, lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=fused)


def runner(step: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """The step, waited for."""

    def run() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def case_functions(name: str, device: torch.device, theirs: Any) -> dict[str, Callable[[], None]]:
    """The bare step, ours, and theirs, each on a model of its own."""
    options = CASES["rows, group lasso"] if name in (HEALING, DEFAULT) else CASES.get(name, {})
    fused = name != DEFAULT
    healing = {"healing_start_step": 1} if name == HEALING else {}
    made: dict[str, Callable[[], Any]] = {"bare": sgd([{"params": weights_of(model_on(device))}], fused).step}
    if name == COUPLED:
        model = model_on(device)
        grouper = CoupledChannelGrouper(model, torch.zeros(1, 3, 64, 64, device=device))
        made["ours"] = PruneOptimizer(sgd(grouper.param_groups(**LASSO)[:1])).step
        made["bare"] = sgd([{"params": grouper.parameters()}]).step
        options = CASES["rows, group lasso"]  # torchao has no coupled groups: its rows are the nearest
    else:
        made["ours"] = PruneOptimizer(sgd([{"params": weights_of(model_on(device)), **options}], fused), **healing).step
    if theirs is not None:
        made["torchao"] = theirs(sgd([{"params": weights_of(model_on(device)), **options}], fused), **healing).step
    return {key: runner(step, device) for key, step in made.items()}


def measure(name: str, device: torch.device, theirs: Any, rounds: int) -> dict[str, Any]:
    """One row of the table of times."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    functions = case_functions(name, device, theirs)
    once = interleaved(functions, 1, 0, clock)
    slow = max(once.values()) > SLOW
    times = interleaved(functions, 3 if slow else rounds, 0 if slow else 3, clock)
    bare, ours, other = times["bare"], times["ours"], times.get("torchao")
    return {
        "groups and map": name,
        "bare SGD, ms": round(1e3 * bare, 2),
        "ours, ms": round(1e3 * ours, 2),
        "torchao, ms": None if other is None else round(1e3 * other, 2),
        "ours / bare": round(ours / bare, 2),
        "torchao / bare": None if other is None else round(other / bare, 2),
        "torchao / ours": None if other is None else round(other / ours, 2),
    }


STAGES = {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048}


def stream_producers(model: nn.Module, stage: str) -> list[Tensor]:
    """The weights whose rows make up a stage's residual stream."""
    found = [(name, p) for name, p in model.named_parameters() if name.startswith(stage) and p.dim() == 4]
    return [p for name, p in found if name.endswith("conv3.weight") or "downsample" in name]


def zeroed_rows(model: nn.Module, options: dict[str, Any]) -> None:
    """Half of the rows of every layer, or half of the coupled channels of every set, become 0."""
    half = {"prox_type": "MinSparsityConstraint", "min_sparsity": 0.5}
    optimizer = PruneOptimizer(sgd([{**options, **half}]))
    optimizer.step()


def removable() -> list[dict[str, Any]]:
    """How much of each residual stream can be removed when half of everything is 0."""
    device = torch.device("cpu")
    alone, coupled = model_on(device), model_on(device)
    zeroed_rows(alone, {"params": weights_of(alone), "group_type": "Dim0Grouper"})
    grouper = CoupledChannelGrouper(coupled, torch.zeros(1, 3, 64, 64))
    zeroed_rows(coupled, grouper.param_groups()[0])
    rows = []
    for stage, width in STAGES.items():
        row: dict[str, Any] = {"stage": stage, "channels": width, "producers": len(stream_producers(alone, stage))}
        for key, model in (("uncoupled rows", alone), ("coupled channels", coupled)):
            gone = torch.stack([(p == 0).flatten(1).all(1) for p in stream_producers(model, stage)]).all(0)
            row[f"removable, {key}"] = f"{100 * float(gone.double().mean()):.1f}%"
        rows.append(row)
    return rows


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", help="measure one case and save nothing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--removable-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, theirs, rows = torch.device(options.device), peer(), []
    if options.only:
        print(markdown([measure(options.only, device, theirs, options.rounds)]))
        return
    if not options.removable_only:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in (*CASES, HEALING, COUPLED, DEFAULT):
                rows.append(measure(name, device, theirs, options.rounds))
                print(markdown(rows[-1:]), flush=True)
        peer_name = "" if theirs is None else f"torchao {version('torchao')}, {PEER_MODULE}, beside ours"
        note = peer_name or "torchao is not installed"
        suffix = "" if device.type == "cpu" else f"_{device.type}"
        save(f"proximal{suffix}", rows, f"A proximal step on ResNet-50's weights ({environment()['device']})", note)
        print(markdown(rows))
        print()
    found = removable()
    title = "Residual streams of ResNet-50: what can be removed when half of the rows or channels are 0"
    save("proximal_removable", found, title, "random weights")
    print(markdown(found))


if __name__ == "__main__":
    main()
