"""What a loop keeps as its best begins anew at a removal, and training batches are no example inputs."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import nn

from pruningawaretraining import Pruning
from pruningawaretraining.errors import ModelError

RULE = {"target": {"sparsity": 0.5}, "scope": "local", "start": 0, "end": 0}
HALF = {"rules": [RULE]}
KINDS = ("EarlyStopping", "ModelCheckpoint")
IMAGE = torch.randn(1, 3, 8, 8)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )


@pytest.mark.parametrize(("told", "times"), [(False, 1), (True, 0)])
def test_a_loop_is_told_once_that_its_best_is_of_another_model(
    told: bool, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    steps = {"rules": [{**RULE, "end": 2, "application": "remove"}]}
    pruner = Pruning(model, steps, example_inputs=IMAGE)
    pruner.best_begins_anew = told
    with caplog.at_level(logging.WARNING):
        done = [pruner.prune(model, epoch) for epoch in range(4)]
    assert done.count("removed") > 1 and done[-1] is None
    said = [one for one in caplog.records if "begin the best metric anew" in one.getMessage()]
    assert len(said) == times
    assert all("pruner.best_begins_anew = True" in one.getMessage() and len(one.getMessage()) < 120 for one in said)


def test_masks_alone_say_nothing_of_the_best(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    pruner = Pruning(model, {"rules": [{"pattern": "element", **RULE}]}, example_inputs=IMAGE)
    assert pruner.prune(model, 0) == "masked" and "best" not in caplog.text


def test_pruning_right_now_says_nothing_of_the_best(caplog: pytest.LogCaptureFixture) -> None:
    pruner = Pruning(net(), {"rules": [{"target": {"sparsity": 0.5}}]}, example_inputs=IMAGE)
    assert pruner.prune() == "removed" and "best" not in caplog.text, "no epoch was before"


# --- training batches -----------------------------------------------------------------------------------------------


class Detector(nn.Module):
    """As ultralytics': called with a batch it gives the loss, with images the predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, images: Any) -> Any:
        if isinstance(images, dict):
            return nn.functional.cross_entropy(self.net(images["img"]), images["cls"]), {"cls_loss": 0.0}
        return self.net(images)


class Labelled(nn.Module):
    """As transformers': with labels it gives the loss, too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.net(images)
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


BATCH = {"img": torch.randn(4, 3, 8, 8), "cls": torch.arange(4) % 2, "bboxes": torch.rand(4, 4)}


def test_a_batch_with_labels_waits_for_a_call_with_inputs(caplog: pytest.LogCaptureFixture) -> None:
    model = Detector()
    pruner = Pruning(model, HALF)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            model(BATCH)
    assert caplog.text.count("is called with a training batch, labels and all") == 1
    with pytest.raises(ModelError, match="example_inputs="):
        pruner.prune(model, 0)
    model.eval()(BATCH["img"])
    assert pruner.prune(model, 0) == "removed" and model.net[0].out_channels == 4


def test_optional_labels_are_left_out_of_the_example() -> None:
    model = Labelled()
    pruner = Pruning(model, HALF)
    model(images=BATCH["img"], labels=BATCH["cls"])
    assert pruner.prune(model, 0) == "removed" and model.net[0].out_channels == 4
    assert set(pruner.state_dict()["inputs"]) == {"images"}
    positional = Labelled()
    again = Pruning(positional, HALF)
    positional(BATCH["img"], labels=BATCH["cls"])
    assert again.prune(positional, 0) == "removed" and set(again.state_dict()["inputs"]) == {"images"}


# --- trainers -------------------------------------------------------------------------------------------------------


def test_lightnings_best_checkpoint_and_patience_begin_anew(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    from pruningawaretraining.integrations.lightning import PruningCallback

    class Classifier(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = net()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("score", 10.0 - self.current_epoch, on_step=False, on_epoch=True)  # ever worse
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = torch.utils.data.TensorDataset(torch.randn(4, 3, 8, 8), torch.arange(4) % 2)
    saver = ModelCheckpoint(tmp_path, monitor="score", mode="max", filename="{epoch}")
    patience = EarlyStopping("score", mode="max", patience=3, check_on_train_epoch_end=True)
    callback = PruningCallback({"rules": [{**RULE, "start": 2, "end": 2}]}, IMAGE, part="model")
    trainer = lightning.Trainer(
        max_epochs=4, callbacks=[callback, saver, patience], logger=False, enable_progress_bar=False,
        accelerator="cpu", enable_model_summary=False,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        trainer.fit(Classifier(), torch.utils.data.DataLoader(data, 2))
    assert "epoch=2" in saver.best_model_path and float(saver.best_model_score) == 8.0
    best = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    assert best["model.0.weight"].shape[0] == 4, "the best checkpoint is pruned"
    assert trainer.current_epoch == 4 and float(patience.best_score) == 8.0 and patience.wait_count == 1
    said = [one.getMessage() for one in caplog.records if one.getMessage().startswith("best: ")]
    assert said == [f"best: channels were removed, so the earlier best score no longer applies ({', '.join(KINDS)})"]


@pytest.mark.parametrize(("mode", "worst"), [("min", math.inf), ("max", -math.inf)])
def test_any_score_is_better_than_the_one_a_removal_leaves(mode: str, worst: float) -> None:
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import EarlyStopping

    from pruningawaretraining.integrations.lightning import _begin_best_anew

    stopping = EarlyStopping("score", mode=mode)
    stopping.best_score, stopping.wait_count = torch.tensor(0.5), 2
    _begin_best_anew([stopping])
    assert float(stopping.best_score) == worst and stopping.wait_count == 0


def test_transformers_best_metric_begins_anew(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    transformers = pytest.importorskip("transformers")
    from pruningawaretraining.integrations.transformers import PruningCallback

    model = Labelled()
    callback = PruningCallback(HALF, {"images": IMAGE})
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    control, state = transformers.TrainerControl(), transformers.TrainerState()
    callback.on_init_end(arguments, state, control, model=model)
    callback.on_train_begin(arguments, state, control, model=model)
    state.epoch, state.best_metric, state.best_model_checkpoint = 1.0, 0.9, "checkpoint-1"
    callback.on_epoch_end(arguments, state, control)
    assert model.net[0].out_channels == 4
    assert state.best_metric is None and state.best_model_checkpoint is None
    assert "the earlier best score no longer applies (TrainerState)" in caplog.text
