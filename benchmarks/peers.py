"""Which other pruning libraries work beside this PyTorch: the smallest call of each, on ResNet-18.

    python benchmarks/peers.py [--path FOLDER] [--only NAME]

Nothing is installed here. Those that are not found in the environment (or in FOLDER, as made by
``pip install --target FOLDER``) are rows that say so; what a library raises is its row. Each runs in a process of its
own. A library that an earlier call had, with the same PyTorch, keeps the row of that call.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torchvision
from common import RESULTS, environment, markdown, save
from torch import nn
from torch.nn import functional

from pruningawaretraining import Pruning, count_macs

TARGET = 0.6
LIMIT = 200


def example() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64)


def steps(model: nn.Module, optimizer: Any, count: int, each: Callable[[], None] = lambda: None) -> None:
    """A few steps of training on noise."""
    model.train()
    for _ in range(count):
        optimizer.zero_grad()
        functional.cross_entropy(model(example()), torch.tensor([1, 2])).backward()
        each()
        optimizer.step()


def ours(model: nn.Module) -> nn.Module:
    Pruning(model, {"rules": [{"target": {"macs": TARGET}}]}, example_inputs=example()).prune(model, 0)
    return model


def torch_pruning(model: nn.Module) -> nn.Module:
    tp = importlib.import_module("torch_pruning")
    importance = tp.importance.GroupMagnitudeImportance()
    options = {"pruning_ratio": 0.25, "ignored_layers": [model.fc], "global_pruning": True}
    tp.pruner.MetaPruner(model, example(), importance=importance, **options).step()
    return model


def torchao(model: nn.Module) -> nn.Module:
    importlib.import_module("torchao.sparsity").apply_fake_sparsity(model)
    return model


def neural_compressor(model: nn.Module) -> nn.Module:
    config = importlib.import_module("neural_compressor.config")
    training = importlib.import_module("neural_compressor.training")
    settings = {
        "pruning_type": "snip_momentum",
        "pattern": "4x1",
        "start_step": 1,
        "end_step": 6,
        "target_sparsity": 0.5,
    }
    manager = training.prepare_compression(model, config.WeightPruningConfig([settings], pruning_frequency=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    manager.callbacks.on_train_begin()
    for step in range(8):
        manager.callbacks.on_step_begin(step)
        steps(model, optimizer, 1, manager.callbacks.on_before_optimizer_step)
        manager.callbacks.on_after_optimizer_step()
        manager.callbacks.on_step_end()
    return model


def modelopt(model: nn.Module) -> nn.Module:
    prune = importlib.import_module("modelopt.torch.prune")
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "data_loader": [(example(), torch.tensor([1, 2]))] * 2,
            "score_func": lambda one: float(sum(p.abs().sum() for p in one.parameters())),
            "checkpoint": str(Path(folder) / "search.pth"),
        }
        pruned, _ = prune.prune(
            model, mode="fastnas", constraints={"flops": f"{TARGET:.0%}"}, dummy_input=example(), config=config
        )
    return pruned  # type: ignore[no-any-return]


def only_train_once(model: nn.Module) -> nn.Module:
    oto = importlib.import_module("only_train_once").OTO(model, example())
    optimizer = oto.hesso(lr=1e-3, target_group_sparsity=0.3, start_pruning_step=1, pruning_steps=4)
    steps(model, optimizer, 8)
    with tempfile.TemporaryDirectory() as folder:
        oto.construct_subnet(out_dir=folder)
        pruned: nn.Module = torch.load(oto.compressed_model_path, weights_only=False)  # whole models are all it saves
    return pruned


def fasterai(model: nn.Module) -> nn.Module:
    found = importlib.import_module("fasterai.prune.all")
    found.Pruner(model, 0.25, "global", found.large_final, example_inputs=example()).prune_model()
    return model


@dataclass(frozen=True)
class Peer:
    """A library: its package, the call that is tried, and the function that does."""

    package: str
    call: str
    try_it: Callable[[nn.Module], nn.Module]


PEERS = {
    "this library": Peer("pruningawaretraining", "a rule with target.macs 0.6", ours),
    "Torch-Pruning": Peer("torch-pruning", "MetaPruner, 25% of the channels", torch_pruning),
    "torchao": Peer("torchao", "apply_fake_sparsity: 2:4, linear layers", torchao),
    "neural-compressor": Peer("neural-compressor", "prepare_compression: 4x1, 50%, 8 steps", neural_compressor),
    "nvidia-modelopt": Peer("nvidia-modelopt", "FastNAS, 60% of the FLOPs", modelopt),
    "only-train-once": Peer("only-train-once", "HESSO, 30% of the groups, 8 steps", only_train_once),
    "fasterai": Peer("fasterai", "Pruner, 25% of the channels", fasterai),
}


def zeros(model: nn.Module) -> float:
    """Zeros among the weights of convolutions and linear layers."""
    weights = [one.weight for one in model.modules() if isinstance(one, (nn.Conv2d, nn.Linear))]
    return sum(int((one == 0).sum()) for one in weights) / sum(one.numel() for one in weights)


def attempt(name: str) -> dict[str, Any]:
    """The row of one library; what it raises is the outcome."""
    peer = PEERS[name]
    try:
        found = version(peer.package)
    except PackageNotFoundError:
        return {"version": "none installed", "outcome": "not tried"}
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    dense = count_macs(model, example())
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            pruned = peer.try_it(model)
            pruned.eval()(example())
        kept, zero = f"{count_macs(pruned, example()) / dense:.4f}", f"{zeros(pruned):.1%}"
    except Exception as error:  # noqa: BLE001 (whatever a library raises is what the table is about)
        lines = str(error).strip().splitlines() or [""]
        return {"version": found, "outcome": f"fails: {type(error).__name__}: {lines[0][:160]}"}
    seconds = round(time.perf_counter() - start, 1)
    return {"version": found, "outcome": "works", "MACs kept": kept, "zero weights": zero, "s": seconds}


def row(name: str, path: Path | None) -> dict[str, Any]:
    """:func:`attempt` in a process of its own: a library may change PyTorch, crash, or never end."""
    places = [str(path.resolve())] if path else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "ignore", __file__, "--one", name]
    base = {"library": name, "version": "", "call": PEERS[name].call}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {**base, "outcome": f"not done after {LIMIT} s"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            return {**base, **json.loads(line)}
    return {**base, "outcome": f"fails: exit status {done.returncode}: {(done.stderr.splitlines() or [''])[-1][:160]}"}


def tried_before() -> dict[str, dict[str, Any]]:
    """Rows of an earlier call with the same PyTorch, of libraries that were there then."""
    path = RESULTS / "peers.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    if known.get("versions") != environment()["versions"]:
        return {}
    return {one["library"]: one for one in known["rows"] if one["outcome"] != "not tried"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, help="a folder with libraries that are not in the environment")
    parser.add_argument("--only", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--one", choices=list(PEERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(attempt(args.one)))
        return
    rows, before = [], tried_before()
    for name in args.only:
        found = row(name, args.path)
        rows.append(before.get(name, found) if found["outcome"] == "not tried" else found)
        print(rows[-1], file=sys.stderr, flush=True)
    note = (
        "The smallest call of each that prunes, on a ResNet-18 without pretrained weights: whether it runs, not how "
        "well it prunes. MACs by `count_macs`. A library that is not installed is a row without version: `pip install "
        "--target FOLDER PACKAGE` and `--path FOLDER` try it without touching the environment. Where they were tried, "
        "neural-compressor was given setuptools below 81 (and ran on numpy 2, which it rules out), nvidia-modelopt "
        "torchprofile below 0.1 (with 0.1: AttributeError: module 'torchprofile.profile' has no attribute 'handlers'), "
        "fasterai fastprogress below 1.1 (above: No module named 'fasthtml')."
    )
    command = "python benchmarks/peers.py" + (" --path FOLDER" if args.path else "")
    if len(args.only) == len(PEERS):
        save("peers", rows, "Other libraries: which still work", note, command)
    print(markdown(rows))


if __name__ == "__main__":
    main()
