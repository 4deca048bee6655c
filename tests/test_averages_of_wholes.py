"""Averages of a module that the pruned model is a part of, such as those of Lightning's whole LightningModule."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pruningawaretraining import Pruning
from pruningawaretraining.errors import ModelError

RULE = {"target": {"sparsity": 0.5}, "scope": "local", "start": 1, "end": 2}
CONFIG = {"rules": [RULE]}
EPOCHS = 4
"""Masked after epoch 1, removed after epoch 2."""
EXAMPLE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(8, 2),
        )  # fmt: skip


class Whole(nn.Module):
    """Holds the model, and something beside it."""

    def __init__(self, parts: int = 1) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({f"net{number}": Net() for number in range(parts)})
        self.other = nn.Linear(2, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.other(self.parts["net0"](images))
        return outputs


def shapes(module: nn.Module) -> list[torch.Size]:
    return [one.shape for one in module.parameters()]


@pytest.mark.parametrize("how", ["ema", "attach_ema", "found"])
def test_the_copy_of_the_model_in_it_is_masked_and_sliced(how: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    whole = Whole()
    model = whole.parts["net0"]
    average = AveragedModel(whole, avg_fn=lambda old, new, count: 0.5 * old + 0.5 * new, use_buffers=True)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.05)
    given = {"ema": average} if how == "ema" else {}
    pruner = Pruning(model, CONFIG, example_inputs=EXAMPLE, optimizer=optimizer, **given)
    if how == "attach_ema":
        pruner.attach_ema(average)
    for epoch in range(EPOCHS):
        for _ in range(3):
            optimizer.zero_grad()
            whole(torch.randn(4, 3, 8, 8)).square().sum().backward()
            optimizer.step()
            average.update_parameters(whole)
        pruner.prune(model, epoch)
        if epoch == 1:
            kept = copy.deepcopy(average.module.parts["net0"])
            masked = [name for name, one in model.named_parameters() if bool((one == 0).any())]
            assert masked and all(bool((kept.get_parameter(name)[one == 0] == 0).all())
                                  for name, one in model.named_parameters())  # fmt: skip
    assert model[0].out_channels == 4 and shapes(average.module) == shapes(whole)
    for name, value in average.module.named_parameters():
        torch.testing.assert_close(value, whole.get_parameter(name), rtol=0.2, atol=0.05, msg=name)
    assert ("average=" in caplog.text or "ema=average" in caplog.text) == (how == "found")
    assert "does not follow" not in caplog.text


def test_several_copies_are_told_apart_by_their_weights_or_named() -> None:
    torch.manual_seed(0)
    whole = Whole(parts=2)
    model = whole.parts["net1"]
    pruner = Pruning(model, CONFIG, example_inputs=EXAMPLE)
    average = copy.deepcopy(whole)
    pruner.attach_ema(average)
    pruner.remove_channels({"0": [0, 1]})
    assert average.parts["net1"][0].out_channels == 6 and average.parts["net0"][0].out_channels == 8
    twins = nn.ModuleDict({"one": copy.deepcopy(model), "two": copy.deepcopy(model)})
    with pytest.raises(ModelError, match=r"ema: ModuleDict holds several copies of the Net: one, two\. Allowed"):
        pruner.attach_ema(twins)
    with pytest.raises(ModelError, match="ema: Whole holds no copy of the Net as it is now"):
        pruner.attach_ema(Whole())


# --- Lightning ------------------------------------------------------------------------------------------------------


def lightning_run(folder: Path, order: str, part: str = "model", resume: int | None = None, give: str = "") -> Any:
    """A training with EMAWeightAveraging before or after the PruningCallback; a checkpoint of every epoch."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

    from pruningawaretraining.integrations.lightning import PruningCallback

    class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model, self.head = Net(), nn.Linear(2, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = self.head(self.model(images))
            return outputs

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    torch.manual_seed(0)
    source = torch.Generator().manual_seed(5)
    images = torch.utils.data.TensorDataset(torch.randn(16, 3, 8, 8, generator=source), torch.arange(16) % 2)
    loader = torch.utils.data.DataLoader(images, 4)
    averaging = EMAWeightAveraging(decay=0.5)
    pruning = PruningCallback(CONFIG, EXAMPLE, part=part, ema=averaging if give == "ema" else None)
    callbacks = [averaging, pruning] if order == "before" else [pruning, averaging]
    saver = ModelCheckpoint(folder / order, "{epoch}", save_top_k=-1, every_n_epochs=1, enable_version_counter=False)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*callbacks, *([saver] if resume is None else [])], enable_checkpointing=resume is None,
    )  # fmt: skip
    module = Classifier()
    path = None if resume is None else folder / order / f"epoch={resume}.ckpt"
    trainer.fit(module, loader, loader, ckpt_path=path)
    return module, averaging._average_model.module, pruning.pruner


@pytest.fixture(scope="module")
def lightning_whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    known: dict[str, Any] = {}
    folder = tmp_path_factory.mktemp("averages")

    def of(order: str) -> Any:
        if order not in known:
            known[order] = lightning_run(folder, order)
        return folder, known[order]

    return of


def states(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one for name, one in module.state_dict().items() if "pruner_state" not in name}


@pytest.mark.parametrize("order", ["before", "after"])
def test_lightnings_average_of_the_whole_follows(
    order: str, lightning_whole: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The average ends as the model, as it is copied into it."""
    with caplog.at_level(logging.WARNING):
        _, (module, average, pruner) = lightning_whole(order)
    assert module.model[0].out_channels == 4 and shapes(average) == shapes(module)
    assert pruner.phase == "done" and "ema:" not in caplog.text
    assert all(torch.equal(value, states(average)[name]) for name, value in states(module).items())


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_it_resumes_with_the_checkpoint_alone(order: str, epoch: int, lightning_whole: Any) -> None:
    """Masked, and removed: the checkpoint's weights are the average's."""
    folder, (module, average, _) = lightning_whole(order)
    again, other, pruner = lightning_run(folder, order, resume=epoch)
    assert pruner.steps == 4 * EPOCHS
    for one, same in ((module, again), (average, other)):
        for name, value in states(one).items():
            torch.testing.assert_close(states(same)[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(("part", "give"), [("model", "ema"), ("", "")])
def test_it_may_be_given_and_the_whole_may_be_pruned(part: str, give: str, tmp_path: Path) -> None:
    module, average, _ = lightning_run(tmp_path, "before", part, give=give)
    assert module.model[0].out_channels == 4 and shapes(average) == shapes(module)
