"""The callbacks for Lightning, transformers and Accelerate: their examples train, lose channels and go on."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pruningawaretraining import Pruning, load_pruned
from pruningawaretraining.checkpoint.records import PRUNER_KEY
from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.experiment.models import DigitsResNet
from pruningawaretraining.integrations.common import STATE, imported, read_state

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    """Examples can be imported; each test has an Accelerator of its own, of which Accelerate keeps one in a process."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)


def example(name: str):
    pytest.importorskip(name.partition("_")[0])
    return importlib.import_module(name)


def dense() -> torch.nn.Module:
    return DigitsResNet(widths=(16, 32), blocks=1)


def check_halved(callback, path: Path) -> None:
    """The target was met inside the training, the model has fewer channels, and the file holds them."""
    pruner: Pruning = callback.pruner
    assert pruner.phase in ("finetune", "done") and pruner.channel_pruner.removed
    assert 0.4 < pruner.macs.fraction <= 0.5
    again = load_pruned(dense(), path / "pruned.safetensors").state_dict()
    own = pruner.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in again.items())
    assert any(value.shape != again[name].shape for name, value in dense().state_dict().items())


@pytest.mark.parametrize("kind", ["lightning_digits", "accelerate_digits"])
def test_an_example_is_interrupted_and_goes_on_twice(kind, tmp_path, capsys):
    """In the middle of masking (bf16, two batches a step), and after the removal: the weights are the same width."""
    module = example(kind)
    arguments = ["--out", str(tmp_path), "--batch-size", "64"]
    before = module.main([*arguments, "--epochs", "3"]).pruner
    masks, steps = before.masks, before.steps
    assert any(not bool(keep.all()) for keep in masks.values()) and not before.channel_pruner.removed
    assert steps in (3 * 10, 3 * 11, 3 * 9), "two batches of 64 make one step"
    after = module.main([*arguments, "--epochs", "6", "--resume"])
    check_halved(after, tmp_path)
    assert after.pruner.steps == 2 * steps
    for name, keep in after.pruner.masks.items():
        assert bool((~keep | masks[name]).all()), "masks are nested"
    last = module.main([*arguments, "--epochs", "7", "--resume"])
    check_halved(last, tmp_path)
    assert all(torch.equal(keep, last.pruner.masks[name]) for name, keep in after.pruner.masks.items())
    accuracy = float(capsys.readouterr().out.strip().splitlines()[-1].split()[1].strip(","))
    assert accuracy > 0.8


def test_the_other_lightning_package_takes_the_callback(tmp_path):
    package = pytest.importorskip("pytorch_lightning")
    from pruningawaretraining.integrations.lightning import PruningCallback

    module = example("lightning_digits")

    class Classifier(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = dense()

        training_step = module.Classifier.training_step
        configure_optimizers = module.Classifier.configure_optimizers

    callback = PruningCallback({"rules": [{**module.RULE, "start": 0, "end": 1}]}, part="model")
    package.Trainer(
        max_epochs=2, limit_train_batches=2, callbacks=[callback], logger=False, enable_progress_bar=False,
        enable_checkpointing=False, accelerator="cpu", enable_model_summary=False,
    ).fit(Classifier(), module.loaders(64)[0])  # fmt: skip
    assert callback.pruner.channel_pruner.removed


def test_transformers_example_is_interrupted_and_goes_on(tmp_path, capsys):
    module = example("transformers_text")
    arguments = ["--out", str(tmp_path), "--width", "32", "--epochs"]
    before = module.main([*arguments, "5"]).pruner
    assert before.phase == "done" and not before.channel_pruner.removed
    folders = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(folders) == 5 and all((folder / STATE).is_file() for folder in folders)
    after = module.main([*arguments, "8", "--resume", str(folders[2])]).pruner
    assert after.channel_pruner.removed and after.sparsity == pytest.approx(0.4, abs=0.01)
    widths = {module.intermediate.dense.out_features for module in after.model.bert.encoder.layer}
    assert widths == {int(4 * 32 * 0.6) + 1} or widths == {int(4 * 32 * 0.6)}
    folder = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    again = module.main([*arguments, "9", "--resume", str(folder)]).pruner
    assert {one.intermediate.dense.out_features for one in again.model.bert.encoder.layer} == widths


def test_going_on_without_the_state_is_refused(tmp_path):
    lightning = example("lightning_digits")
    lightning.main(["--out", str(tmp_path), "--epochs", "1", "--batch-size", "512"])
    from pruningawaretraining.integrations.lightning import PruningCallback

    callback = PruningCallback({"rules": [lightning.RULE]}, part="model")
    trainer = lightning.lightning.Trainer(
        max_epochs=2, callbacks=[callback], logger=False, enable_progress_bar=False, accelerator="cpu",
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    weights = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del weights["state_dict"][f"model.{PRUNER_KEY}"]  # as earlier versions wrote it
    torch.save(weights, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="resume_from=ckpt_path"):
        trainer.fit(lightning.Classifier(), lightning.loaders(512)[0], ckpt_path=tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="holds no pruner.pt"):
        read_state(tmp_path)
    (tmp_path / STATE).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state(tmp_path)


@pytest.mark.parametrize("name", ["lightning", "transformers", "accelerate"])
def test_a_package_that_is_not_there_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"{name} is not installed.*pruningawaretraining\[{name}\]"):
        imported(name, name)


@pytest.mark.slow
def test_an_accelerate_run_of_one_process_goes_on_with_two(tmp_path):
    """The checkpoint has lost channels: the wrapper that accelerate made before is made anew."""
    module = example("accelerate_digits")
    module.main(["--out", str(tmp_path), "--batch-size", "64", "--epochs", "5"])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = [str(EXAMPLES / "accelerate_digits.py"), "--out", str(tmp_path), "--resume", "--epochs", "7"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [sys.executable, *launcher, *script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "of the MACs" in done.stdout
