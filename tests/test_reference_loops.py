"""The loops of timm's and torchvision's training scripts, with the lines of docs/integrations.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pruningawaretraining import Pruning, load_pruned, save_pruned
from pruningawaretraining.checkpoint.records import PRUNER_KEY, own_state
from pruningawaretraining.experiment.datasets import load_data
from pruningawaretraining.experiment.models import DigitsResNet
from pruningawaretraining.experiment.schema import DataConfig

EXAMPLE = torch.randn(1, 1, 8, 8)
CONFIG = {"rules": [{"regularizer": "growing_l2", "start": 1, "end": 3, "target": {"sparsity": 0.4}}]}
EPOCHS = 5


def build() -> nn.Module:
    torch.manual_seed(0)
    return DigitsResNet(widths=(8, 16), blocks=1)


@pytest.fixture(scope="module")
def loader():
    data = load_data(DataConfig(name="digits"))
    images, labels = next(data.train.batches(512, None, torch.device("cpu")))
    return DataLoader(TensorDataset(images.float() / 255, labels), 64)


def check(pruner: Pruning, average: nn.Module, path: Path) -> None:
    assert pruner.phase == "finetune" and pruner.macs.fraction <= 0.6
    shapes = {name: value.shape for name, value in own_state(pruner.model).items()}
    assert {name: value.shape for name, value in average.state_dict().items()} == shapes
    assert load_pruned(build(), path)(torch.randn(2, 1, 8, 8)).shape == (2, 10)


class TimmRun:
    """The objects of timm's train.py: task, average, saver, scheduler and clipping, with the lines of the docs."""

    def __init__(self, folder, resume=None):
        task_module, utils = pytest.importorskip("timm.task"), pytest.importorskip("timm.utils")
        from timm.loss import LabelSmoothingCrossEntropy
        from timm.optim import create_optimizer_v2
        from timm.scheduler import create_scheduler_v2

        self.utils, self.task = utils, task_module.ClassificationTask(build(), LabelSmoothingCrossEntropy(0.1))
        self.model = self.task.get_trainable_module()
        self.optimizer = create_optimizer_v2(self.model, opt="sgd", lr=0.05, momentum=0.9, weight_decay=1e-4)
        self.pruner = Pruning(self.model, CONFIG, example_inputs=EXAMPLE, optimizer=self.optimizer)
        self.pruner.state_in(self.model)
        self.first = 0
        checkpoint = None if resume is None else torch.load(resume, weights_only=True)
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint["state_dict"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.first = checkpoint["epoch"] + 1
        self.task.setup_ema(decay=0.9)
        if checkpoint is not None:
            utils.unwrap_model(self.task.get_eval_model(ema=True)).load_state_dict(checkpoint["state_dict_ema"])
        self.pruner.attach_ema(self.task.get_trainable_module(ema=True))
        if dist.is_initialized():
            self.task.prepare_distributed()
            self.model = self.task.get_trainable_module()
        folder.mkdir(exist_ok=True)
        self.saver = utils.CheckpointSaver(
            self.model, self.optimizer, checkpoint_dir=str(folder), recovery_dir=str(folder), task=self.task
        )
        self.scheduler, _ = create_scheduler_v2(self.optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=1)
        self.scheduler.step(self.first)

    def train(self, loader):
        for epoch in range(self.first, EPOCHS):
            self.task.get_trainable_module().train()
            for images, labels in loader:
                self.task(images, labels)["loss"].backward()
                self.utils.dispatch_clip_grad(self.task.get_clip_parameters(), 1.0, mode="norm")
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.task.update_ema()
            if self.pruner.prune(self.model, epoch) == "removed":
                self.saver.best_metric = None
            self.model = self.pruner.rewrap(self.model)
            self.saver.save_checkpoint(epoch, metric=1.0 - epoch / 10)  # ever worse
            self.scheduler.step(epoch + 1)
        return self


@pytest.fixture
def one_process(request, tmp_path):
    """The loop as it is, or in a group of one process, where timm's task wraps the model."""
    if request.param:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    if request.param:
        dist.destroy_process_group()


@pytest.mark.parametrize("one_process", [False, True], indirect=True)
def test_timms_loop(loader, tmp_path, one_process, caplog):
    """Its own checkpoints, best one and average; it goes on from before and after the removal and ends the same."""
    whole = TimmRun(tmp_path / "whole").train(loader)
    save_pruned(whole.model, tmp_path / "pruned.safetensors")
    average = whole.task.get_trainable_module(ema=True)
    check(whole.pruner, average.module, tmp_path / "pruned.safetensors")
    assert "does not follow the model any more" not in caplog.text
    sizes = {}
    for epoch in range(EPOCHS):
        state = torch.load(tmp_path / "whole" / f"checkpoint-{epoch}.pth.tar", weights_only=True)["state_dict"]
        sizes[epoch] = sum(value.numel() for name, value in state.items() if PRUNER_KEY not in name)
    removed = next(epoch for epoch in sizes if sizes[epoch] < sizes[0])
    assert 1 < removed < EPOCHS - 1
    best = torch.load(tmp_path / "whole" / "model_best.pth.tar", weights_only=True)
    assert best["epoch"] == removed, "the best checkpoint is pruned"
    for epoch in (removed - 1, removed):
        again = TimmRun(tmp_path / "again", tmp_path / "whole" / f"checkpoint-{epoch}.pth.tar").train(loader)
        for one, other in ((whole.model, again.model), (average, again.task.get_trainable_module(ema=True))):
            for (name, value), same in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
                if PRUNER_KEY not in name:
                    torch.testing.assert_close(value, same, rtol=0, atol=1e-6, msg=name)


def test_torchvisions_loop(loader, tmp_path):
    """As train.py of torchvision's references, with its checkpoint and --resume in the middle and after the removal."""

    def begin():
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        model_ema = torch.optim.swa_utils.AveragedModel(
            model, avg_fn=lambda old, new, count: 0.9 * old + 0.1 * new, use_buffers=True
        )
        pruner = Pruning(model, CONFIG, example_inputs=EXAMPLE, optimizer=optimizer, ema=model_ema)
        pruner.state_in(model)
        return model, optimizer, scheduler, model_ema, pruner

    def train(parts, first, last):
        model, optimizer, scheduler, model_ema, pruner = parts
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        for epoch in range(first, last):
            model.train()
            for number, (images, labels) in enumerate(loader):
                loss = criterion(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                if number % 2 == 0:
                    model_ema.update_parameters(model)
            pruner.prune(model, epoch)
            scheduler.step()

    whole = begin()
    train(whole, 0, EPOCHS)
    parts = begin()
    for first, last in ((0, 2), (2, 4), (4, EPOCHS)):  # masked at 2, removed at 4
        train(parts, first, last)
        names = ("model", "optimizer", "lr_scheduler", "model_ema")
        torch.save(dict(zip(names, (one.state_dict() for one in parts[:4]), strict=True)), tmp_path / "checkpoint.pth")
        checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
        parts = begin()
        for name, one in zip(names, parts[:4], strict=True):
            one.load_state_dict(checkpoint[name])
    for (name, value), other in zip(whole[0].state_dict().items(), parts[0].state_dict().values(), strict=True):
        if PRUNER_KEY in name:
            continue
        torch.testing.assert_close(value, other, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    save_pruned(parts[0], tmp_path / "pruned.safetensors")
    check(parts[4], parts[3].module, tmp_path / "pruned.safetensors")
