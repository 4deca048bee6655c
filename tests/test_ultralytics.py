"""The callback for ultralytics, with stand-ins that hold the same objects as its trainer, and with the package itself.

The stand-ins follow ultralytics 8.4: what the trainer builds anew, what its average caches, what it pickles, when its
callbacks are called. Where the package is installed the real trainer runs, too.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.integrations.ultralytics import STATE, PruningCallback
from pruningawaretraining.session.state_in import unpacked

CONFIG = {"rules": [{"regularizer": "growing_l2", "target": {"sparsity": 0.5}, "start": 1, "end": 3}]}
EPOCHS = 5


class Detector(nn.Module):
    """A batch gives the loss; images give predictions and, in eval mode, what the loss is made of."""

    def __init__(self, yaml: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.yaml = yaml
        self.model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1),
            nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 4, 1),
        )  # fmt: skip

    def forward(self, x: Any) -> Any:
        if isinstance(x, dict):
            return (self.model(x["img"]) - x["bboxes"]).square().mean(), {"box_loss": 0.0}
        y = self.model(x)
        return y if self.training else (y.sigmoid(), {"boxes": y})

    def load(self, weights: nn.Module) -> None:
        """Weights of other shapes are left out without a word."""
        own = self.state_dict()
        found = {k: v for k, v in weights.float().state_dict().items() if k in own and own[k].shape == v.shape}
        self.load_state_dict(found, strict=False)


class ModelEMA:
    """No module; the lists are made at the first update and kept."""

    def __init__(self, model: nn.Module) -> None:
        self.ema = copy.deepcopy(model).eval()
        self.updates, self._pairs = 0, None
        for parameter in self.ema.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        if self._pairs is None:
            now = model.state_dict()
            floating = [(v, now[k]) for k, v in self.ema.state_dict().items() if v.dtype.is_floating_point]
            self._pairs = tuple(zip(*floating, strict=True))
        torch._foreach_lerp_(list(self._pairs[0]), list(self._pairs[1]), 0.5)


class Trainer:
    """Builds the model from its YAML always, pickles the average as a whole, and keeps the best fitness."""

    def __init__(self, overrides: dict[str, Any], _callbacks: dict[str, list[Any]]) -> None:
        self.args = SimpleNamespace(imgsz=16, model=overrides.get("model", "net.yaml"))
        self.resume, self.wdir = overrides.get("resume", False), overrides["folder"]
        self.callbacks = {event: list(calls) for event, calls in _callbacks.items()}
        self.model: Any = self.args.model
        self.ema: ModelEMA | None = None
        self.best_fitness, self.start_epoch, self.epochs = None, 0, overrides.get("epochs", EPOCHS)
        self.run_callbacks("on_pretrain_routine_start")

    def run_callbacks(self, event: str) -> None:
        for call in self.callbacks.get(event, []):
            call(self)

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        model = Detector(cfg)
        if weights is not None:
            model.load(weights)
        return model

    def _setup(self) -> None:
        checkpoint = None
        if str(self.model).endswith(".pt"):
            checkpoint = torch.load(self.model, weights_only=False)
            self.model = self.get_model("net.yaml", checkpoint["ema"].float())
        elif not isinstance(self.model, nn.Module):
            self.model = self.get_model("net.yaml")
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.ema, self.stopper = ModelEMA(self.model), SimpleNamespace(best_fitness=0.0, best_epoch=0)
        if checkpoint is not None and self.resume:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.ema.ema.load_state_dict(checkpoint["ema"].float().state_dict())
            self.best_fitness, self.start_epoch = checkpoint["best_fitness"], checkpoint["epoch"] + 1
        self.run_callbacks("on_pretrain_routine_end")

    def train(self) -> None:
        self._setup()
        assert self.ema is not None
        for epoch in range(self.start_epoch, self.epochs):
            self.epoch = epoch
            self.model.train()
            source = torch.Generator().manual_seed(self.epoch)
            for _ in range(3):
                batch = {"img": torch.randn(4, 3, 16, 16, generator=source), "cls": torch.zeros(4), "bboxes": 0.1}
                self.model(batch)[0].backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.ema.update(self.model)
            self.run_callbacks("on_train_epoch_end")
            fitness = 1.0 - self.epoch / 10  # ever worse: without a new beginning the first file stays the best
            self.best_fitness = fitness if self.best_fitness is None else max(fitness, self.best_fitness)
            self._save(fitness)
        self.run_callbacks("on_train_end")

    def _save(self, fitness: float) -> None:
        assert self.ema is not None
        content = {
            "epoch": self.epoch, "best_fitness": self.best_fitness, "ema": copy.deepcopy(self.ema.ema).half(),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }  # fmt: skip
        torch.save(content, self.wdir / "last.pt")
        torch.save(content, self.wdir / f"epoch{self.epoch}.pt")
        if fitness == self.best_fitness:
            torch.save(content, self.wdir / "best.pt")


class Yolo:
    """As YOLO: callbacks, the trainer of its task, or one that is given."""

    task, task_map = "detect", {"detect": {"trainer": Trainer}}

    def __init__(self, model: str, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.callbacks: dict[str, list[Any]] = defaultdict(list)

    def add_callback(self, event: str, call: Any) -> None:
        self.callbacks[event].append(call)

    def train(self, trainer: Any = None, **overrides: Any) -> Any:
        made = (trainer or Trainer)({"model": self.model, "folder": self.folder, **overrides}, self.callbacks)
        made.train()
        return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> tuple[PruningCallback, Trainer, Path]:
    folder = tmp_path_factory.mktemp("weights")
    model = Yolo("net.yaml", folder)
    callback = PruningCallback(CONFIG).add_to(model)
    return callback, model.train(), folder


def read(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=False)
    return loaded


def size(model: nn.Module) -> int:
    return sum(one.numel() for one in model.parameters())


def test_the_trainer_prunes_and_what_it_keeps_follows(trained: Any, caplog: pytest.LogCaptureFixture) -> None:
    callback, trainer, folder = trained
    pruner = callback.pruner
    assert pruner.phase == "done" and pruner.sparsity >= 0.5 and size(trainer.model) < size(Detector())
    sizes = [size(read(folder / f"epoch{epoch}.pt")["ema"]) for epoch in range(EPOCHS)]
    removed = next(epoch for epoch, one in enumerate(sizes) if one < size(Detector()))
    assert removed == 3
    best = read(folder / "best.pt")
    assert best["epoch"] == removed and size(best["ema"]) == size(trainer.model), "the best file is pruned"
    for name, value in trainer.ema.ema.named_parameters():
        torch.testing.assert_close(value, trainer.model.get_parameter(name), rtol=0.2, atol=0.02, msg=name)


def test_files_need_the_library_for_nothing_and_hold_the_state(trained: Any) -> None:
    _, trainer, folder = trained
    raw = (folder / "last.pt").read_bytes()
    assert b"pruningawaretraining" not in raw.replace(bytes(read(folder / "last.pt")["ema"].pruner_state.numpy()), b"")
    average = read(folder / "last.pt")["ema"]
    assert unpacked(getattr(average, STATE))["channels"]["removed"].any()
    assert not average.state_dict().keys() ^ Detector().state_dict().keys()


@pytest.mark.parametrize("epoch", [0, 2, 3])
def test_a_training_goes_on_from_before_and_after_the_removal(epoch: int, trained: Any, tmp_path: Path) -> None:
    before, straight, folder = trained
    model = Yolo(str(folder / f"epoch{epoch}.pt"), tmp_path)
    callback = PruningCallback(CONFIG).add_to(model)
    trainer = model.train(resume=True, trainer=callback.trainer(model))
    assert trainer.start_epoch == epoch + 1 and callback.pruner.steps == before.pruner.steps == 3 * EPOCHS
    assert callback.pruner.phase == "done" and callback.pruner.sparsity >= 0.5
    if epoch == 3:
        assert all(torch.equal(keep, callback.pruner.masks[key]) for key, keep in before.pruner.masks.items())
        assert size(trainer.ema.ema) == size(trainer.model) == size(straight.model)
    assert size(read(tmp_path / "last.pt")["ema"]) == size(trainer.model)


def test_a_pruned_file_is_trained_further_as_it_is(trained: Any, tmp_path: Path) -> None:
    _, straight, folder = trained
    model = Yolo(str(folder / "best.pt"), tmp_path)
    callback = PruningCallback(CONFIG).add_to(model)
    trainer = model.train(trainer=callback.trainer(model), epochs=1)
    assert size(trainer.model) == size(straight.model)


def test_going_on_with_the_plain_trainer_is_refused(trained: Any, tmp_path: Path) -> None:
    model = Yolo(str(trained[2] / "last.pt"), tmp_path)
    PruningCallback(CONFIG).add_to(model)
    with pytest.raises(CheckpointError, match=r"resume: .*trainer=callback.trainer\(model\)"):
        model.train(resume=True)


def test_the_fall_of_the_best_fitness_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Yolo("net.yaml", tmp_path)
    callback = PruningCallback(CONFIG).add_to(model)
    callback.add_to(model)  # once is enough
    with caplog.at_level(logging.WARNING):
        model.train()
    said = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert said == ["best.pt: channels have gone, so the best fitness of before (1) counts no more"]


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="model: a Detector takes no callbacks"):
        PruningCallback(CONFIG).add_to(Detector())
    with pytest.raises(ConfigError, match="the pruner is made once the trainer has the model"):
        _ = PruningCallback(CONFIG).pruner


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ultralytics") is None, reason="ultralytics is not installed")
def test_the_real_trainer_prunes_resumes_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    from ultralytics import YOLO

    data = made_data(tmp_path)
    rule = {"regularizer": "growing_l2", "target": {"sparsity": 0.2}, "start": 0, "end": 2}
    config = {"rules": [{**rule, "exclude": [r"re:model\.22\..*"]}]}
    common = {"data": str(data), "imgsz": 64, "batch": 8, "device": "cpu", "plots": False, "optimizer": "SGD"}
    model = YOLO("yolov8n.yaml")
    callback = PruningCallback(config).add_to(model)
    model.train(epochs=4, save_period=1, project=str(tmp_path), name="run", **common)
    weights = tmp_path / "run" / "weights"
    sizes = [size(read(weights / f"epoch{epoch}.pt")["ema"]) for epoch in range(4)]
    assert sizes[0] == sizes[1] > sizes[2] == sizes[3] == size(read(weights / "best.pt")["model"])
    assert callback.pruner.sparsity >= 0.19
    for epoch in (1, 2):
        again = YOLO(weights / f"epoch{epoch}.pt")
        resumed = PruningCallback(config).add_to(again)
        again.train(resume=True, trainer=resumed.trainer(again))
        assert resumed.pruner.phase == "done" and size(again.model) <= sizes[3] * 1.1
    exported = YOLO(weights / "best.pt").export(format="onnx", imgsz=64)
    assert Path(exported).is_file()


def made_data(folder: Path) -> Path:
    """Images of rectangles in two colours, as ultralytics reads them."""
    from PIL import Image

    source = torch.Generator().manual_seed(0)
    for part, count in (("train", 16), ("val", 4)):
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True)
        for number in range(count):
            left, top, width, height = (int(torch.randint(8, 28, (), generator=source)) for _ in range(4))
            image = torch.zeros(64, 64, 3, dtype=torch.uint8)
            image[top : top + height, left : left + width, number % 2] = 220
            Image.fromarray(image.numpy()).save(folder / "images" / part / f"{number}.png")
            box = ((left + width / 2) / 64, (top + height / 2) / 64, width / 64, height / 64)
            line = " ".join([str(number % 2), *(f"{one:.4f}" for one in box)])
            (folder / "labels" / part / f"{number}.txt").write_text(line + "\n")
    path = folder / "data.yaml"
    path.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames: {{0: red, 1: green}}\n")
    return path
