"""Accelerate: a loop of one's own on handwritten digits; half of the MACs go while it trains.

pip install 'pruningawaretraining[accelerate]'
accelerate launch examples/accelerate_digits.py                  # or python, or torchrun --nproc_per_node=2
python examples/accelerate_digits.py --resume                    # goes on from the last checkpoint
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from pruningawaretraining import save_pruned
from pruningawaretraining.experiment.datasets import load_data
from pruningawaretraining.experiment.models import DigitsResNet
from pruningawaretraining.experiment.schema import DataConfig
from pruningawaretraining.integrations.accelerate import PruningCallback

RULE = {
    "regularizer": {"type": "growing_l2", "strength": 1e-3},
    "start": 1, "end": 4, "target": {"macs": 0.5}, "final_sparsity": 0.6,
}  # fmt: skip


def loaders(batch_size: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """The digits of scikit-learn."""
    data = load_data(DataConfig(name="digits"))
    parts = []
    for source in (data.train, data.test):
        (images, labels) = next(source.batches(len(source), None, torch.device("cpu")))
        parts.append(TensorDataset((images.float() / 255 - data.mean[0]) / data.std[0], labels))
    return DataLoader(parts[0], batch_size, shuffle=True, drop_last=True), DataLoader(parts[1], 500)


def main(arguments: list[str] | None = None) -> PruningCallback:
    """Parse, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32, help="of each process")
    parser.add_argument("--precision", default="bf16", choices=["no", "bf16", "fp16"])
    parser.add_argument("--accumulate", type=int, default=2, help="batches for each step of the optimizer")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"))
    args = parser.parse_args(arguments)
    set_seed(0)
    accelerator = Accelerator(
        mixed_precision=args.precision,
        gradient_accumulation_steps=args.accumulate,
        cpu=not torch.cuda.is_available(),
    )
    model: Any = DigitsResNet(widths=(16, 32), blocks=1)
    callback = PruningCallback(accelerator, model, {"rules": [RULE]}, torch.randn(1, 1, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimizer, train, test = accelerator.prepare(model, optimizer, *loaders(args.batch_size))
    checkpoint, begun = args.out / "checkpoint", 0
    if args.resume:
        accelerator.load_state(str(checkpoint))
        begun = int((checkpoint / "epoch").read_text())
    for epoch in range(begun, args.epochs):
        model.train()
        for images, labels in train:
            with accelerator.accumulate(model):
                accelerator.backward(functional.cross_entropy(model(images), labels))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        callback.on_epoch_end(model, epoch)
        accelerator.save_state(str(checkpoint))
        if accelerator.is_main_process:
            (checkpoint / "epoch").write_text(str(epoch + 1))
    model.eval()
    right = seen = 0
    for images, labels in test:
        with torch.no_grad():
            found, labels = accelerator.gather_for_metrics((model(images).argmax(1), labels))
        right, seen = right + int((found == labels).sum()), seen + len(labels)
    accelerator.print(f"accuracy {right / seen:.4f}, {callback.pruner.macs.fraction:.4f} of the MACs")
    if accelerator.is_main_process:
        save_pruned(accelerator.unwrap_model(model), args.out / "pruned.safetensors")
    accelerator.end_training()
    return callback


if __name__ == "__main__":
    main()
