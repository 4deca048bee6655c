"""A small network and the loops that the tests of dynamics train in: by a closure or without, and by Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def step(optimizer: torch.optim.Optimizer, evaluate: Callable[[], Tensor], closure: bool) -> None:
    """Evaluate the model inside the optimizer's step, or before it."""
    if closure:
        optimizer.step(evaluate)  # type: ignore[arg-type]
    else:
        evaluate()
        optimizer.step()


def fitted(
    config: Mapping[str, Any],
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    data: Iterable[tuple[Tensor, Tensor]],
    epochs: int,
) -> tuple[nn.Module, Any]:
    """The network after a training by Lightning with a pruner, and the pruner's callback."""
    lightning = pytest.importorskip("lightning")
    from pruningawaretraining.integrations.lightning import PruningCallback

    class Classifier(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return make_optimizer(self.parameters())

    callback, module = PruningCallback(config, part="model"), Classifier()
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=[callback], logger=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(list(data), batch_size=None))  # type: ignore[arg-type]
    return module.model, callback
