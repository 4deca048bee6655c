"""One-shot pruning of pretrained CIFAR-10 ResNets: magnitude, OBS, CAP (both merges), FastCAP and SparseGPT.

    OMP_NUM_THREADS=1 python benchmarks/one_shot_cifar.py --data FOLDER [--depths 20 56] [--test 10000] [--norms 0]

FOLDER holds a ``load.py`` with ``cifar10(split) -> (images, labels, names)`` and ``cifar_resnet_state(depth)``. Every
convolution but the first, and the classifier, are pruned; nothing is trained afterwards. The batch norms keep their
statistics unless --norms says over how many micro-batches they are measured again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, markdown, save
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining.experiment.models import CifarResNet
from pruningawaretraining.session.one_shot import AfterPruning, accuracy, one_shot

COMMAND = "python benchmarks/one_shot_cifar.py --data FOLDER"
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def criteria(grads: int, micro_batch: int, block: int) -> dict[str, dict[str, Any]]:
    """Name in the table -> criterion, and the scope if it is not global. The dampenings were best on training images
    that are in no gradient, for ResNet-20."""
    sampling = {"num_grads": grads, "micro_batch": micro_batch}
    fisher = {**sampling, "fisher_block_size": block}
    obs, cap = {"type": "obs", **fisher, "damp": 1e-3}, {"type": "cap", **fisher, "damp": 1e-6}
    return {
        "magnitude": {"type": "magnitude", "normalize": "none"},
        "magnitude, layers alike": {"type": "magnitude", "normalize": "none", "scope": "local"},
        "OBS": obs,
        "OBS, damp 1e-7": {**obs, "damp": 1e-7},
        "OBS, joint update": {**obs, "compensation": "joint"},
        "OBS, 4 rounds": {**obs, "num_recomputations": 4},
        "CAP, cumulative": {**cap, "merge": "cumulative"},
        "CAP, running max": cap,
        "CAP, layers alike": {**cap, "scope": "local"},
        "CAP, 4 rounds": {**cap, "num_recomputations": 4},
        "FastCAP": {"type": "fast_cap", **sampling, "fisher_block_size": block},
        "SparseGPT": {"type": "sparse_gpt", "num_grads": grads // 16, "micro_batch": 16 * micro_batch},
    }


def normalised(images: Any) -> Tensor:
    """uint8 NHWC -> float NCHW as the networks were trained."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return ((pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)).contiguous()


@dataclass(frozen=True)
class Batches:
    """A data set in memory as batches, in a fixed order."""

    images: Tensor
    labels: Tensor
    size: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.images.split(self.size), self.labels.split(self.size), strict=True)


def load_module(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_data", folder / "load.py")
    if spec is None or spec.loader is None or not (folder / "load.py").is_file():
        raise SystemExit(f"--data: {folder} holds no load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sparsity(model: nn.Module) -> float:
    """Zeros among the weights that were to be pruned."""
    weights = [p for name, p in model.named_parameters() if p.dim() > 1 and name != "conv1.weight"]
    return sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)


def measure(
    model: nn.Module, train: Batches, test: Batches, pattern: str, criterion: dict[str, Any], norms: int
) -> dict[str, Any]:
    """Accuracies at every sparsity, in percent, and the CPU seconds of the pruning."""
    wanted = SPARSITIES if pattern == "unstructured" else (0.5,)
    scope = criterion.get("scope", "global")
    criterion = {key: value for key, value in criterion.items() if key != "scope"}
    rule = {
        "pattern": pattern,
        "criterion": criterion,
        "exclude": ["conv1"],
        "scope": scope,
        "target": {"sparsity": 0.5},
    }
    start = time.process_time()
    models = one_shot(model, rule, train, functional.cross_entropy, wanted, after=AfterPruning(norm_batches=norms))
    seconds = time.process_time() - start
    row: dict[str, Any] = {}
    for level, pruned in models.items():
        assert abs(sparsity(pruned) - level) < 1e-3, (criterion, level, sparsity(pruned))
        row[f"{level:.0%}"] = round(100 * accuracy(pruned, test), 2)
    return {**row, "prune, CPU s": round(seconds, 1)}


def known_rows(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def merged(known: list[dict[str, Any]], new: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """The rows with a new one in its place: by network, pattern (unstructured first) and criterion."""

    def place(row: dict[str, Any]) -> tuple[int, bool, int]:
        return int(row["network"].split("-")[1]), row["pattern"] != "unstructured", names.index(row["criterion"])

    return sorted([*(row for row in known if place(row) != place(new)), new], key=place)


def applies(name: str, pattern: str, depth: int, rounds: bool) -> bool:
    """Whether a row is in the table: variants of OBS for single weights only, "layers alike" for the small network."""
    if "rounds" in name:
        return rounds and pattern == "unstructured"
    if "alike" in name:
        return depth == 20 and pattern == "unstructured"
    return pattern == "unstructured" or not name.startswith("OBS,")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4"])
    parser.add_argument("--only", nargs="+", help="names of criteria, as in the table")
    parser.add_argument("--rounds", action="store_true", help="OBS and CAP in four rounds, too")
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument("--grads", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--norms", type=int, default=0, help="micro-batches over which batch norms are measured again")
    parser.add_argument("--name", default="one_shot_cifar", help="of the result; its rows not measured now are kept")
    args = parser.parse_args()
    if args.data is None:
        print("skipped: this benchmark needs --data FOLDER", file=sys.stderr)
        return
    loader = load_module(args.data)
    images, labels, _ = loader.cifar10("train")
    needed = max(args.grads * args.micro_batch, 2048)
    train = Batches(normalised(images[:needed]), torch.from_numpy(labels[:needed]), 256)
    images, labels, _ = loader.cifar10("test")
    test = Batches(normalised(images[: args.test]), torch.from_numpy(labels[: args.test]), 250)
    options = criteria(args.grads, args.micro_batch, args.block)
    rows = known_rows(args.name)
    norms = f"measured again over {args.norms} micro-batches" if args.norms else "as they were"
    note = (
        f"Top-1 on {len(test.labels):,} test images, nothing trained after pruning, batch norms {norms}; "
        f"{args.grads} gradients of {args.micro_batch} image(s) each, blocks of {args.block}, damp 1e-3 for OBS, "
        "1e-6 for CAP (for ResNet-20 the best on 1,000 training images that are in no gradient). The first convolution "
        "stays dense. Magnitude, OBS and CAP rank all layers together, FastCAP and SparseGPT prune every layer alike: "
        'compare them with the rows "layers alike".'
    )
    for depth in args.depths:
        model = CifarResNet(depth)
        model.load_state_dict(loader.cifar_resnet_state(depth))
        model.eval().to(memory_format=torch.channels_last)
        dense = round(100 * accuracy(model, test), 2)
        for pattern in args.patterns:
            for name, criterion in options.items():
                if (args.only and name not in args.only) or not applies(name, pattern, depth, args.rounds):
                    continue
                row = {"network": f"ResNet-{depth}", "pattern": pattern, "criterion": name, "dense": dense}
                row.update(measure(model, train, test, pattern, criterion, args.norms))
                print(row, file=sys.stderr, flush=True)
                rows = merged(rows, row, list(options))
                save(args.name, rows, "One-shot pruning of pretrained CIFAR-10 ResNets", note, COMMAND)
    print(markdown(rows))


if __name__ == "__main__":
    main()
