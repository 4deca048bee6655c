"""Stand-ins that hold the same objects as ultralytics 8.4: what the trainer builds anew, what its average caches, what
it pickles, when its callbacks are called. test_ultralytics.py uses them, and runs them under torchrun.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pruningawaretraining.checkpoint.records import own_state
from pruningawaretraining.distributed.collectives import rank
from pruningawaretraining.models.calling import unwrap

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
            now = unwrap(model).state_dict()
            floating = [(v, now[k]) for k, v in self.ema.state_dict().items() if v.dtype.is_floating_point]
            self._pairs = tuple(zip(*floating, strict=True))
        torch._foreach_lerp_(list(self._pairs[0]), list(self._pairs[1]), 0.5)


class Trainer:
    """Builds the model from its YAML always, pickles the average as a whole, and keeps the best fitness.

    Of several processes only the first has the beginning and the end called, and writes files.
    """

    def __init__(self, overrides: dict[str, Any], _callbacks: dict[str, list[Any]]) -> None:
        self.args = SimpleNamespace(imgsz=16, model=overrides.get("model", "net.yaml"))
        self.resume, self.wdir = overrides.get("resume", False), overrides["folder"]
        self.callbacks = {event: list(calls) for event, calls in _callbacks.items()}
        self.model: Any = self.args.model
        self.ema: ModelEMA | None = None
        self.best_fitness, self.start_epoch, self.epochs = None, 0, overrides.get("epochs", EPOCHS)
        self.first = rank() == 0
        if self.first:
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
        if dist.is_initialized():
            self.model = DistributedDataParallel(self.model, find_unused_parameters=True)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.ema, self.stopper = ModelEMA(unwrap(self.model)), SimpleNamespace(best_fitness=0.0, best_epoch=0)
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
            source = torch.Generator().manual_seed(self.epoch + 100 * rank())
            for _ in range(3):
                batch = {"img": torch.randn(4, 3, 16, 16, generator=source), "cls": torch.zeros(4), "bboxes": 0.1}
                self.model(batch)[0].backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.ema.update(self.model)
            self.run_callbacks("on_train_epoch_end")
            fitness = 1.0 - self.epoch / 10  # ever worse: without a new beginning the first file stays the best
            self.best_fitness = fitness if self.best_fitness is None else max(fitness, self.best_fitness)
            if self.first:
                self._save(fitness)
        if self.first:
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

    def __init__(self, file: str, folder: Path) -> None:
        self.file, self.folder, self.from_file = file, folder, file.endswith(".pt")
        self.model: nn.Module = (
            torch.load(file, weights_only=False)["ema"].float() if self.from_file else Detector(file)
        )
        self.callbacks: dict[str, list[Any]] = defaultdict(list)

    def add_callback(self, event: str, call: Any) -> None:
        self.callbacks[event].append(call)

    def train(self, trainer: Any = None, **overrides: Any) -> Any:
        """The dense model is built from the YAML, with what fits of the weights; the best is loaded at the end."""
        made = (trainer or Trainer)({"model": self.file, "folder": self.folder, **overrides}, self.callbacks)
        if not overrides.get("resume"):
            made.model = made.get_model(cfg="net.yaml", weights=self.model if self.from_file else None)
            self.model = made.model
        made.train()
        best = self.folder / "best.pt"
        last = torch.load(best if best.exists() else self.folder / "last.pt", weights_only=False)
        self.model, self.from_file = last["ema"].float(), True
        return made


def main(*folders: str) -> None:
    """One process of several, as ultralytics starts them: trainer and callbacks come pickled in a file."""
    dist.init_process_group("gloo")
    for folder in folders:
        state = torch.load(Path(folder) / "state.pt", weights_only=False)
        trainer = state["trainer"](state["args"], state["callbacks"])
        trainer.train()
        found = {"model": own_state(unwrap(trainer.model)), "average": own_state(trainer.ema.ema)}
        torch.save(found, Path(folder) / f"rank{rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
