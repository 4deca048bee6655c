"""Lightning: a small residual network on handwritten digits loses half of its MACs while the Trainer fits it.

pip install 'pruningawaretraining[lightning]'
python examples/lightning_digits.py                              # a minute on a CPU
python examples/lightning_digits.py --resume                     # goes on from the last checkpoint
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from pruningawaretraining import save_pruned
from pruningawaretraining.experiment.datasets import load_data
from pruningawaretraining.experiment.models import DigitsResNet
from pruningawaretraining.experiment.schema import DataConfig
from pruningawaretraining.integrations.lightning import PruningCallback

RULE = {
    "regularizer": {"type": "growing_l2", "strength": 1e-3},
    "start": 1, "end": 4, "target": {"macs": 0.5}, "final_sparsity": 0.6,
}  # fmt: skip


class Classifier(lightning.LightningModule):
    """The network, its loss and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Module = DigitsResNet(widths=(16, 32), blocks=1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(self.model(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def loaders(batch_size: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """The digits of scikit-learn."""
    data = load_data(DataConfig(name="digits"))
    parts = []
    for source in (data.train, data.test):
        (images, labels) = next(source.batches(len(source), None, torch.device("cpu")))
        parts.append(TensorDataset((images.float() / 255 - data.mean[0]) / data.std[0], labels))
    return DataLoader(parts[0], batch_size, shuffle=True, drop_last=True), DataLoader(parts[1], 500)


def main(arguments: list[str] | None = None) -> PruningCallback:
    """Parse, fit, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--accumulate", type=int, default=2, help="batches for each step of the optimizer")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    args = parser.parse_args(arguments)
    last = args.out / "last.ckpt" if args.resume else None
    lightning.seed_everything(0)
    train, test = loaders(args.batch_size)
    callback = PruningCallback({"rules": [RULE]}, torch.randn(1, 1, 8, 8), part="model", resume_from=last)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        precision=args.precision,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=1.0,
        callbacks=[callback, ModelCheckpoint(args.out, save_last=True, every_n_epochs=1, enable_version_counter=False)],
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier()
    trainer.fit(module, train, test, ckpt_path=last)
    print(f"accuracy {trainer.callback_metrics['accuracy']:.4f}, {callback.pruner.macs.fraction:.4f} of the MACs")
    save_pruned(module.model, args.out / "pruned.safetensors")
    return callback


if __name__ == "__main__":
    main()
