"""Mistakes with the callbacks of Lightning, transformers and Accelerate are said by name, or do no harm."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pruningawaretraining.checkpoint.records import PRUNER_KEY
from pruningawaretraining.errors import CheckpointError, ConfigError

IMAGE = torch.randn(1, 3, 8, 8)
HALF = {"rules": [{"target": {"sparsity": 0.5}, "scope": "local", "start": 0, "end": 0}]}


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )


def batches() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(4, 3, 8, 8), torch.arange(4) % 2), 2)


# --- Lightning ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fit() -> Any:
    """A function that fits a new or a given LightningModule with a callback."""
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = net()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def run(
        callback: Any, module: Any = None, path: Path | None = None, save: Path | None = None, epochs: int = 1
    ) -> Any:
        module = module or Classifier()
        trainer = lightning.Trainer(
            max_epochs=epochs, callbacks=[callback], logger=False, enable_progress_bar=False, accelerator="cpu",
            enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, batches(), ckpt_path=path)
        if save is not None:
            trainer.save_checkpoint(save)
        return module

    return run


def lightning_callback(*arguments: Any, **options: Any) -> Any:
    from pruningawaretraining.integrations.lightning import PruningCallback

    return PruningCallback(*arguments, **options)


def test_lightning_prunes_every_model_it_is_given(fit: Any, caplog: pytest.LogCaptureFixture) -> None:
    callback = lightning_callback(HALF, IMAGE, part="model")
    first, second = fit(callback), fit(callback)
    assert [one.model[0].out_channels for one in (first, second)] == [4, 4]
    assert callback.pruner.model is second.model
    with caplog.at_level(logging.WARNING):
        fit(callback, second)
    assert "has ended with an earlier training" in caplog.text


def test_an_average_of_another_model_is_refused(fit: Any) -> None:
    callback = lightning_callback(HALF, IMAGE, part="model", ema=net())
    fit(callback)
    with pytest.raises(ConfigError, match="ema: it is of the Sequential .* a new PruningCallback"):
        fit(callback)


def test_lightning_resumes_with_the_checkpoint_alone(fit: Any, tmp_path: Path) -> None:
    """Its weights hold the state. In one of an earlier version they do not: then both arguments or none."""
    path = tmp_path / "a.ckpt"
    fit(lightning_callback(HALF, IMAGE, part="model"), save=path)
    callback = lightning_callback(HALF, IMAGE, part="model")
    assert fit(callback, path=path, epochs=2).model[0].out_channels == 4 and callback.pruner.steps == 4
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["state_dict"][f"model.{PRUNER_KEY}"]
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match=r"resume_from: .*fit was given no checkpoint.*ckpt_path"):
        fit(lightning_callback(HALF, IMAGE, part="model", resume_from=path))
    with pytest.raises(CheckpointError, match=r"resume_from: 0.weight is \(4, 3, 3, 3\) .* and \(8, 3, 3, 3\)"):
        fit(lightning_callback(HALF, IMAGE, part="model"), path=path)
    callback = lightning_callback(HALF, IMAGE, part="model", resume_from=path)
    assert fit(callback, path=path, epochs=2).model[0].out_channels == 4


def test_lightning_parts(fit: Any) -> None:
    with pytest.raises(ConfigError, match=r"part: submodule: 'modle' is not known; did you mean 'model'\?"):
        fit(lightning_callback(HALF, IMAGE, part="modle"))
    with pytest.raises(
        ConfigError, match="part: '' is the Classifier itself, which has no forward.* part= one of model"
    ):
        fit(lightning_callback(HALF, IMAGE))
    finer = {"rules": [{"pattern": "element", "target": {"sparsity": 0.5}, "start": 0, "end": 0}]}
    module = fit(lightning_callback(finer))
    assert float((module.model[2].weight == 0).float().mean()) == pytest.approx(0.5, abs=0.1)


def test_a_config_is_read_when_the_callback_is_made() -> None:
    pytest.importorskip("lightning")
    with pytest.raises(ConfigError, match="rulez"):
        lightning_callback({"rulez": []})


# --- transformers ---------------------------------------------------------------------------------------------------


class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.net(images)
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    """A function that makes a Trainer with callbacks."""
    transformers = pytest.importorskip("transformers")

    def make(*callbacks: Any, model: nn.Module | None = None, epochs: int = 1) -> Any:
        arguments = transformers.TrainingArguments(
            str(tmp_path / "run"), num_train_epochs=epochs, use_cpu=True, report_to="none", disable_tqdm=True,
            save_strategy="epoch", logging_strategy="no", per_device_train_batch_size=2, remove_unused_columns=False,
        )  # fmt: skip
        data = [{"images": torch.randn(3, 8, 8), "labels": number % 2} for number in range(4)]
        return transformers.Trainer(model or Labelled(), arguments, train_dataset=data, callbacks=list(callbacks))

    return make


def trainer_callback(config: Any = HALF, **options: Any) -> Any:
    from pruningawaretraining.integrations.transformers import PruningCallback

    return PruningCallback(config, {"images": IMAGE}, **options)


def test_transformers_prunes_every_model_it_is_given(trainer: Any) -> None:
    callback = trainer_callback()
    for _ in range(2):
        one = trainer(callback)
        one.train()
        assert one.model.net[0].out_channels == 4 and callback.pruner.model is one.model


def test_transformers_refuses_two_callbacks(trainer: Any) -> None:
    with pytest.raises(ConfigError, match="two PruningCallbacks are of the same Labelled"):
        trainer(trainer_callback(), trainer_callback()).train()
    callback = trainer_callback()
    with pytest.raises(ConfigError, match="this PruningCallback is given twice"):
        trainer(callback, callback).train()


@pytest.mark.parametrize("end", [0, 3])
def test_transformers_resumes_with_the_checkpoint_alone(end: int, trainer: Any) -> None:
    """Its weights hold the state. In one of an earlier version they do not: then both arguments or none."""
    config = {"rules": [{**HALF["rules"][0], "end": end}]}
    first = trainer(trainer_callback(config))
    first.train()
    folder = Path(first.args.output_dir) / "checkpoint-2"
    alone = trainer(callback := trainer_callback(config), epochs=2)
    alone.train(resume_from_checkpoint=str(folder))
    assert alone.model.net[0].out_channels == first.model.net[0].out_channels and callback.pruner.steps == 4
    weights = load_file(folder / "model.safetensors")
    del weights[PRUNER_KEY]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"resume_from: .*train was given no checkpoint"):
        trainer(trainer_callback(config, resume_from=folder)).train()
    with pytest.raises(CheckpointError, match=r"resume_from: .*Allowed: PruningCallback\(..., resume_from="):
        trainer(trainer_callback(config), epochs=2).train(resume_from_checkpoint=str(folder))
    again = trainer(trainer_callback(config, resume_from=folder), epochs=2)
    again.train(resume_from_checkpoint=str(folder))
    assert again.model.net[0].out_channels == first.model.net[0].out_channels


# --- Accelerate -----------------------------------------------------------------------------------------------------


def test_accelerate_mistakes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    accelerate = pytest.importorskip("accelerate")
    from pruningawaretraining.integrations.accelerate import PruningCallback

    accelerator, model, other = accelerate.Accelerator(cpu=True), net(), net()
    with pytest.raises(
        ConfigError, match=r"accelerator: Sequential is not an Accelerator. Allowed: PruningCallback\(accelerator, mod"
    ):
        PruningCallback(model, accelerator, HALF, IMAGE)
    with pytest.raises(ConfigError, match="model: dict is not a module"):
        PruningCallback(accelerator, HALF, model, IMAGE)
    first = PruningCallback(accelerator, model, HALF, IMAGE)
    with pytest.raises(ConfigError, match="has a PruningCallback already"):
        PruningCallback(accelerator, model, HALF, IMAGE)
    assert first.on_epoch_end(model, 0) == "removed" and first.on_epoch_end(model, 1) is None
    assert caplog.text.count("begin the best metric anew") == 1, "the loop is the user's"
    assert model[0].out_channels == 4
    with caplog.at_level(logging.WARNING):
        second = PruningCallback(accelerator, other, HALF, IMAGE)
    assert "its checkpoints hold the pruner of the Sequential from here on" in caplog.text
    accelerator.prepare(other)
    accelerator.save_state(tmp_path)
    state = torch.load(tmp_path / "pruner.pt", weights_only=True)
    assert not state["channels"]["removed"].any() and second.pruner.model is other  # the first one's are gone
    late = accelerator.prepare(net())
    with pytest.raises(ConfigError, match="model: accelerator.prepare has had this Sequential already"):
        PruningCallback(accelerator, late, HALF, IMAGE)
