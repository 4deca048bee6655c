"""The loops of timm's and torchvision's training scripts with the lines of docs/integrations.md.

The stand-ins make the same objects in the same order as the scripts. test_reference_loops.py uses them, and runs them
under torchrun.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pruningawaretraining import Pruning, save_pruned
from pruningawaretraining.checkpoint.records import own_state
from pruningawaretraining.distributed.collectives import rank
from pruningawaretraining.experiment.models import DigitsResNet

EXAMPLE = torch.randn(1, 1, 8, 8)
CONFIG = {"rules": [{"regularizer": "growing_l2", "start": 1, "end": 3, "target": {"sparsity": 0.4}}]}
EPOCHS = 5
"""Masked after epochs 1 and 2, removed after epoch 3."""
Batches = list[tuple[Tensor, Tensor]]


def build() -> nn.Module:
    torch.manual_seed(0)
    return DigitsResNet(widths=(8, 16), blocks=1)


def batches(epoch: int, count: int = 4) -> Batches:
    """Blobs in ten places, one for each class; every process has its own."""
    source = torch.Generator().manual_seed(1000 * epoch + rank())
    labels = [torch.randint(10, (32,), generator=source) for _ in range(count)]
    places = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    return [(places[one] + torch.randn(32, 1, 8, 8, generator=source), one) for one in labels]


class TimmRun:
    """timm's train.py: task, average, saver, scheduler and clipping."""

    def __init__(self, folder: Path, resume: Path | None = None) -> None:
        from timm import utils
        from timm.loss import LabelSmoothingCrossEntropy
        from timm.optim import create_optimizer_v2
        from timm.scheduler import create_scheduler_v2
        from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint

        self.utils, self.task = utils, ClassificationTask(build(), LabelSmoothingCrossEntropy(0.1), verbose=False)
        self.model = self.task.get_trainable_module()
        self.optimizer = create_optimizer_v2(self.model, opt="sgd", lr=0.05, momentum=0.9, weight_decay=1e-4)
        self.pruner = Pruning(self.model, CONFIG, example_inputs=EXAMPLE, optimizer=self.optimizer)
        self.pruner.state_in(self.model)
        self.first = 0
        if resume is not None:
            self.first = resume_task_checkpoint(self.task, str(resume), optimizer=self.optimizer, log_info=False)
        self.task.setup_ema(decay=0.9)
        if resume is not None:
            load_task_ema_checkpoint(self.task, str(resume))
        self.pruner.attach_ema(self.task.get_trainable_module(ema=True))
        self.pruner.best_begins_anew = True
        if dist.is_initialized():
            self.task.prepare_distributed()
            self.model = self.task.get_trainable_module()
        self.saver: Any = None
        if rank() == 0:
            folder.mkdir(exist_ok=True)
            self.saver = utils.CheckpointSaver(
                self.model, self.optimizer, checkpoint_dir=str(folder), recovery_dir=str(folder), task=self.task,
                max_history=3,  # full at the removal, of better and dense ones
            )  # fmt: skip
        self.scheduler, _ = create_scheduler_v2(self.optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=1)
        self.scheduler.step(self.first)

    @property
    def average(self) -> nn.Module:
        module: nn.Module = self.task.get_trainable_module(ema=True).module
        return module

    def train(self) -> TimmRun:
        for epoch in range(self.first, EPOCHS):
            self.task.get_trainable_module().train()
            for images, labels in batches(epoch):
                self.task(images, labels)["loss"].backward()
                self.utils.dispatch_clip_grad(self.task.get_clip_parameters(), 1.0, mode="norm")
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.task.update_ema()
            if self.pruner.prune(self.model, epoch) == "removed" and self.saver is not None:
                self.saver.best_metric, self.saver.checkpoint_files = None, []
            self.model = self.pruner.rewrap(self.model)
            if self.saver is not None:
                self.saver.save_checkpoint(epoch, metric=1.0 - epoch / 10)  # ever worse
            self.scheduler.step(epoch + 1)
        return self


class TorchvisionRun:
    """references/classification/train.py: the wrapper is there before the pruner, and weights are loaded after it."""

    def __init__(self, folder: Path, resume: Path | None = None) -> None:
        self.folder = folder
        self.model = model = build()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        if dist.is_initialized():
            self.model = DistributedDataParallel(model)
        self.model_ema = torch.optim.swa_utils.AveragedModel(
            model, avg_fn=lambda old, new, count: 0.9 * old + 0.1 * new, use_buffers=True
        )
        self.pruner = Pruning(model, CONFIG, example_inputs=EXAMPLE, optimizer=self.optimizer, ema=self.model_ema)
        self.pruner.state_in(model)
        self.first = 0
        self.kept = {
            "model": model, "optimizer": self.optimizer, "lr_scheduler": self.scheduler, "model_ema": self.model_ema
        }  # fmt: skip
        if resume is not None:
            checkpoint = torch.load(resume, map_location="cpu", weights_only=True)
            for name, one in self.kept.items():
                one.load_state_dict(checkpoint[name])
            self.first = checkpoint["epoch"] + 1

    @property
    def average(self) -> nn.Module:
        return self.model_ema.module

    def train(self) -> TorchvisionRun:
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        for epoch in range(self.first, EPOCHS):
            self.model.train()
            for number, (images, labels) in enumerate(batches(epoch)):
                loss = criterion(self.model(images), labels)
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                if number % 2 == 0:
                    self.model_ema.update_parameters(self.model)
            self.pruner.prune(self.model, epoch)
            self.model = self.pruner.rewrap(self.model)
            self.scheduler.step()
            if rank() == 0:
                self.folder.mkdir(exist_ok=True)
                state = {name: one.state_dict() for name, one in self.kept.items()}
                torch.save({**state, "epoch": epoch}, self.folder / f"model_{epoch}.pth")
        return self


RUNS: dict[str, Any] = {"timm": TimmRun, "torchvision": TorchvisionRun}
CHECKPOINTS = {"timm": "checkpoint-{}.pth.tar", "torchvision": "model_{}.pth"}


def ended(kind: str, folder: Path, resume: Path | None = None) -> dict[str, Any]:
    """Run to the end: what model and average are then; the pruned model is in the folder."""
    run = RUNS[kind](folder, resume).train()
    folder.mkdir(exist_ok=True)
    if rank() == 0:  # statistics of norms are those of each process
        save_pruned(run.model, folder / "pruned.safetensors")
    states = {"model": own_state(run.pruner.model), "average": own_state(run.average)}
    return {**states, "phase": run.pruner.phase, "macs": run.pruner.macs.fraction}


def main(*jobs: str) -> None:
    """One process of several: trainings one after the other, each KIND FOLDER CHECKPOINT, "-" for the beginning."""
    dist.init_process_group("gloo")
    for kind, folder, resume in zip(jobs[::3], jobs[1::3], jobs[2::3], strict=True):
        found = ended(kind, Path(folder), None if resume == "-" else Path(resume))
        torch.save(found, Path(folder) / f"rank{rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
