"""Small trainings with Lightning, transformers' Trainer and Accelerate: test_trainers.py uses them, and runs them
under torchrun.

Each is pruned by its callback, has a moving average, and writes a checkpoint after every epoch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from pruningawaretraining import Pruning
from pruningawaretraining.checkpoint.records import own_state
from pruningawaretraining.distributed.collectives import rank, world_size

RULE = {"regularizer": "growing_l2", "target": {"sparsity": 0.5}, "scope": "local", "start": 0, "end": 2}
CONFIG = {"rules": [RULE]}
EPOCHS, REMOVED = 5, 2
"""Masked after epochs 0 and 1, removed after epoch 2."""
IMAGE = torch.randn(1, 3, 8, 8)


@dataclass(frozen=True)
class Ended:
    """What a training has in the end."""

    pruner: Pruning
    model: nn.Module
    average: AveragedModel

    def states(self) -> dict[str, dict[str, Tensor]]:
        return {"model": own_state(self.model), "average": own_state(self.average.module)}


class Net(nn.Module):
    """Called as transformers does it it gives a loss, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(8, 2),
        )  # fmt: skip

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.layers(images)
        return logits if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


def averaged(model: nn.Module) -> AveragedModel:
    average = AveragedModel(model, avg_fn=lambda old, new, count: 0.5 * old + 0.5 * new, use_buffers=True)
    return average.requires_grad_(False)  # DistributedDataParallel waits for the gradients of what it holds


def data() -> TensorDataset:
    source = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(16, 3, 8, 8, generator=source), torch.arange(16) % 2)


def lightning(folder: Path, resume: int | None = None) -> Ended:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import DDPStrategy

    from pruningawaretraining.integrations.lightning import PruningCallback

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Net()
            self.average = averaged(self.model)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def on_train_batch_end(self, *_: Any) -> None:
            self.average.update_parameters(self.model)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)

    module = Classifier()
    callback = PruningCallback(CONFIG, IMAGE, part="model", ema=module.average)
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    several: dict[str, Any] = {"strategy": DDPStrategy(process_group_backend="gloo")} if world_size() > 1 else {}
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, callbacks=[callback, saver], logger=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, devices=world_size(), **several,
    )  # fmt: skip
    path = None if resume is None else folder / f"epoch={resume}.ckpt"
    trainer.fit(module, DataLoader(data(), 4 // world_size()), ckpt_path=path)
    return Ended(callback.pruner, module.model, module.average)


def transformers(folder: Path, resume: int | None = None) -> Ended:
    import transformers

    from pruningawaretraining.integrations.transformers import PruningCallback

    model = Net()
    average = averaged(model)

    class Averaging(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            average.update_parameters(model)

    callback = PruningCallback(CONFIG, {"images": IMAGE}, ema=average)
    arguments = transformers.TrainingArguments(
        str(folder), num_train_epochs=EPOCHS, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="epoch",
        logging_strategy="no", per_device_train_batch_size=4 // world_size(), remove_unused_columns=False, optim="sgd",
        optim_args="momentum=0.9", learning_rate=0.05, ddp_backend="gloo" if world_size() > 1 else None,
    )  # fmt: skip
    items = [{"images": image, "labels": int(label)} for image, label in data()]
    trainer = transformers.Trainer(model, arguments, train_dataset=items, callbacks=[callback, Averaging()])
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / f"checkpoint-{4 * (resume + 1)}"))
    return Ended(callback.pruner, model, average)


def accelerate(folder: Path, resume: int | None = None) -> Ended:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from pruningawaretraining.integrations.accelerate import PruningCallback

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, model = Accelerator(cpu=True), Net()
    average = averaged(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    callback = PruningCallback(accelerator, model, CONFIG, IMAGE, ema=average)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data(), 4 // world_size()))
    accelerator.register_for_checkpointing(average)
    if resume is not None:
        accelerator.load_state(str(folder / str(resume)))
    for epoch in range(0 if resume is None else resume + 1, EPOCHS):
        wrapped.train()
        for images, labels in loader:
            with accelerator.accumulate(wrapped):
                accelerator.backward(nn.functional.cross_entropy(wrapped(images), labels))
                optimizer.step()
                optimizer.zero_grad()
            average.update_parameters(model)
        callback.on_epoch_end(wrapped, epoch)
        accelerator.save_state(str(folder / str(epoch)))
    return Ended(callback.pruner, model, average)


TRAINERS: dict[str, Callable[..., Ended]] = {
    "lightning": lightning, "transformers": transformers, "accelerate": accelerate
}  # fmt: skip


def main(folder: str) -> None:
    """One process of several: every trainer, and again from the checkpoint after the removal."""
    dist.init_process_group("gloo")
    for name, train in TRAINERS.items():
        for start, resume in (("whole", None), ("after", REMOVED)):
            found = train(Path(folder) / name, resume)
            torch.save(found.states(), Path(folder) / f"{name}-{start}-{rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
