"""Gradual pruning, or one shot and fine-tuning, as a SparseML-style recipe says; on one process or on several.

    python examples/sparse_training.py --recipe examples/recipes/cap_gradual.yaml --sparsities 0.5 0.75 0.9
    torchrun --nproc_per_node=2 examples/sparse_training.py --recipe examples/recipes/cap_gradual.yaml

The model comes by name (torchvision's, timm's as timm:vit_tiny_patch16_224, or package.module:callable), best with
--weights; the data is scikit-learn's digits unless --data says otherwise. With several processes every batch is shared
between them, and so are gradients and blocks of the Fisher; each decides on the same masks.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from pruningawaretraining import Pruning, save_pruned
from pruningawaretraining.config.recipe import load_recipe
from pruningawaretraining.experiment.build import build_model
from pruningawaretraining.experiment.data import DataSet, Pipeline
from pruningawaretraining.experiment.datasets import load_data
from pruningawaretraining.experiment.schema import DataConfig, ModelConfig
from pruningawaretraining.experiment.tracking import Watch, tracked
from pruningawaretraining.one_shot import accuracy


@dataclass(frozen=True)
class Share:
    """This process's part of every batch.

    Args:
        data: the images.
        size: of a batch, over all processes.
        device: of this process.
    """

    data: DataSet
    size: int
    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def pipeline(self) -> Pipeline:
        return Pipeline(self.data.mean, self.data.std)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The training batches of an epoch, in the same order on every process."""
        generator = torch.Generator().manual_seed(number)
        for images, labels in self.pipeline.train(self.data.train, self.size, generator, self.device):
            yield images[self.rank :: self.world], labels[self.rank :: self.world]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What curvature is measured on."""
        return self.epoch(0)

    def test(self) -> list[tuple[Tensor, Tensor]]:
        return list(self.pipeline.test(self.data.test, 500, self.device))


def train(args: argparse.Namespace, share: Share, watch: Watch) -> dict[str, Any]:
    """Train as the recipe says; returns the last row of results."""
    torch.manual_seed(0)
    recipe = load_recipe(args.recipe)
    config = ModelConfig(name=args.model, weights=args.weights)
    model = build_model(config, len(share.data.classes), share.data.shape[0]).to(share.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    pruner = Pruning(model, recipe.pruning, optimizer=optimizer)
    pruner.calibrate_with(share, functional.cross_entropy)
    network: nn.Module = DistributedDataParallel(model) if share.world > 1 else model
    steps, saved, row = max(1, len(share.data.train) // share.size), set(), {}
    for epoch in range(recipe.epochs):
        pruner.prune(model, epoch)  # events are at the beginning of an epoch
        network.train()
        for number, (images, labels) in enumerate(share.epoch(epoch)):
            recipe.rates.apply(optimizer, epoch + number / steps)
            optimizer.zero_grad()
            functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
        if share.rank == 0:
            row = {"epoch": epoch, "sparsity": pruner.sparsity, "accuracy": accuracy(model, share.test())}
            print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
            watch(row)
            for level in milestones(args.sparsities, pruner.sparsity, saved, last=epoch + 1 == recipe.epochs):
                args.out.mkdir(parents=True, exist_ok=True)
                save_pruned(model, args.out / f"sparse_{level:g}.safetensors")
    return {**row, "masks": {name: mask.clone() for name, mask in pruner.masks.items()}, "model": model.state_dict()}


def milestones(wanted: list[float], reached: float, saved: set[float], last: bool) -> list[float]:
    """The sparsities whose model is to be saved now; at the end, the last model too."""
    now = [level for level in wanted if level not in saved and reached >= level - 1e-3]
    saved.update(now)
    return [*now, *([round(reached, 3)] if last and round(reached, 3) not in now else [])]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Parse, join the other processes if there are any, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--model", default="pruningawaretraining.experiment.models:digits_resnet")
    parser.add_argument("--weights", help="a state dict to start from (.safetensors, .pt)")
    parser.add_argument("--data", default="digits", help="digits, CIFAR10, imagefolder ...")
    parser.add_argument("--data-dir")
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    parser.add_argument("--sparsities", type=float, nargs="*", default=[], help="save the model when each is reached")
    parser.add_argument("--out", type=Path, default=Path("runs/sparse_training"))
    parser.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases")
    args = parser.parse_args(arguments)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        data = load_data(DataConfig(name=args.data, root=args.data_dir))
        share = Share(data, args.batch_size, device, rank, world)
        with tracked(args.wandb if rank == 0 else None, Path(args.recipe).stem) as watch:
            return train(args, share, watch)
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
