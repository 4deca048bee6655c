"""The loops of timm's and torchvision's training scripts, with the lines of docs/integrations.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pruningawaretraining import Pruning, load_pruned, save_pruned
from pruningawaretraining.experiment.datasets import load_data
from pruningawaretraining.experiment.models import DigitsResNet
from pruningawaretraining.experiment.schema import DataConfig

CONFIG = {"rules": [{"regularizer": "growing_l2", "start": 1, "end": 3, "target": {"macs": 0.6}}]}
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
    shapes = {name: value.shape for name, value in pruner.model.state_dict().items()}
    assert {name: value.shape for name, value in average.state_dict().items()} == shapes
    assert load_pruned(build(), path)(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_timms_loop(loader, tmp_path):
    """As train.py of timm: its optimizer, scheduler, loss, scaler with clipping, and average."""
    utils = pytest.importorskip("timm.utils")
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    model = build()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, momentum=0.9, weight_decay=1e-4)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=1)
    model_ema = utils.ModelEmaV3(model, decay=0.9)
    loss_fn = LabelSmoothingCrossEntropy(0.1)
    pruner = Pruning(model, CONFIG, example_inputs=torch.randn(1, 1, 8, 8), optimizer=optimizer, ema=model_ema)
    for epoch in range(EPOCHS):
        model.train()
        losses = utils.AverageMeter()
        for images, labels in loader:
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_fn(model(images), labels)
            loss.backward()
            utils.dispatch_clip_grad(model.parameters(), 1.0, mode="norm")
            optimizer.step()
            optimizer.zero_grad()
            model_ema.update(model)
            losses.update(loss.item(), len(images))
        pruner.prune(model, epoch)
        model = pruner.rewrap(model)
        scheduler.step(epoch + 1, losses.avg)
    save_pruned(model, tmp_path / "pruned.safetensors")
    check(pruner, model_ema.module, tmp_path / "pruned.safetensors")


def test_torchvisions_loop(loader, tmp_path):
    """As train.py of torchvision's references, with its checkpoint and --resume in the middle and after the removal."""

    def begin():
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        model_ema = torch.optim.swa_utils.AveragedModel(
            model, avg_fn=lambda old, new, count: 0.9 * old + 0.1 * new, use_buffers=True
        )
        pruner = Pruning(model, CONFIG, example_inputs=torch.randn(1, 1, 8, 8), optimizer=optimizer, ema=model_ema)
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
        names = ("model", "optimizer", "lr_scheduler", "model_ema", "pruner")
        torch.save(dict(zip(names, (one.state_dict() for one in parts), strict=True)), tmp_path / "checkpoint.pth")
        checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
        parts = begin()
        for name, one in sorted(zip(names, parts, strict=True), key=lambda pair: pair[0] != "pruner"):
            one.load_state_dict(checkpoint[name])
    for (name, value), other in zip(whole[0].state_dict().items(), parts[0].state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    save_pruned(parts[0], tmp_path / "pruned.safetensors")
    check(parts[4], parts[3].module, tmp_path / "pruned.safetensors")
