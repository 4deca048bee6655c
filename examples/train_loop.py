"""Three lines in an ordinary training loop: half of the channels go while a small network learns to read digits.

python examples/train_loop.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pruningawaretraining import Pruner, count_macs, save_pruned
from pruningawaretraining.experiment.models import digits_resnet

TRAIN = 1297  # of 1797 images


def load() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) with mean 0 and deviation 1, and labels, in a random order."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)[order]
    return (images - images.mean()) / images.std(), torch.tensor(digits.target)[order]


def train_one_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    model.train()
    for batch in torch.randperm(TRAIN).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return float((model(images[TRAIN:]).argmax(1) == labels[TRAIN:]).float().mean())


def main(num_epochs: int = 16) -> float:
    torch.manual_seed(0)
    images, labels = load()
    model = digits_resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    dense_macs = count_macs(model, images[:1])

    pruner = Pruner(model, target_sparsity=0.5, schedule="linear", total_steps=num_epochs // 2)

    for epoch in range(num_epochs):
        train_one_epoch(model, optimizer, images, labels)
        pruner.step()
        reached = accuracy(model, images, labels)
        print(f"epoch {epoch + 1:2}  {pruner.phase:9}  sparsity {pruner.sparsity:.2f}  accuracy {reached:.3f}")

    kept = count_macs(model, images[:1]) / dense_macs
    print(f"{kept:.1%} of the MACs are left: saved to {save_pruned(model, 'runs/train_loop/pruned.safetensors')}")
    return reached


if __name__ == "__main__":
    main()
