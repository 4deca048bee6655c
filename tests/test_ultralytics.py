"""The callback for ultralytics, with stand-ins for its trainer, and with the package itself where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics_loop import CONFIG, EPOCHS, Detector, Trainer, Yolo

from pruningawaretraining import export_onnx
from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.integrations.ultralytics import STATE, PruningCallback, first_output
from pruningawaretraining.session.state_in import unpacked

SCRIPT = Path(__file__).parent / "ultralytics_loop.py"
EXAMPLES = Path(__file__).parents[1] / "examples"


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


PLAIN = "ultralytics builds the dense model anew"


@pytest.mark.parametrize("file", ["best.pt", "epoch2.pt", "net.yaml"])
@pytest.mark.parametrize("plain", [True, False])
def test_a_pruned_file_in_the_plain_trainer_is_said(
    file: str, plain: bool, trained: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Files that are masked only, and new models, may be trained by the plain trainer."""
    _, straight, folder = trained
    model = Yolo(file if file == "net.yaml" else str(folder / file), tmp_path)
    callback = PruningCallback(CONFIG).add_to(model)
    with caplog.at_level(logging.WARNING):
        trainer = model.train(epochs=1, **({} if plain else {"trainer": callback.trainer(model)}))
    said = [one.getMessage() for one in caplog.records if PLAIN in one.getMessage()]
    assert len(said) == (file == "best.pt" and plain)
    assert all("model.train(..., trainer=callback.trainer(model))" in one for one in said)
    assert size(trainer.model) == (size(straight.model) if file == "best.pt" and not plain else size(Detector()))


def test_training_on_with_the_same_objects_is_said_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Yolo("net.yaml", tmp_path)
    PruningCallback(CONFIG).add_to(model)
    model.train()
    assert PLAIN not in caplog.text and size(model.model) < size(Detector())
    model.train(epochs=1)
    assert caplog.text.count(PLAIN) == 1


def test_the_callback_travels_to_the_processes_that_the_trainer_starts(trained: Any, tmp_path: Path) -> None:
    """Pickled as ultralytics does it, also with the trainer that goes on; the wrapper is made anew."""
    cloudpickle = pytest.importorskip("cloudpickle")
    _, _, folder = trained
    jobs: dict[str, Any] = {"whole": ("net.yaml", False), "after": (str(folder / "epoch3.pt"), True)}
    for name, (start, resume) in jobs.items():
        model = Yolo(start, tmp_path / name)
        (tmp_path / name).mkdir()
        callback = PruningCallback(CONFIG).add_to(model)
        state = {
            "trainer": callback.trainer(model) if resume else Trainer, "callbacks": dict(model.callbacks),
            "args": {"model": start, "folder": tmp_path / name, "resume": resume},
        }  # fmt: skip
        torch.save(state, tmp_path / name / "state.pt", pickle_module=cloudpickle)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, *launcher, str(SCRIPT), *(str(tmp_path / name) for name in jobs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in jobs:
        first, second = (torch.load(tmp_path / name / f"rank{n}.pt", weights_only=True) for n in (0, 1))
        assert sum(one.numel() for one in first["model"].values()) < size(Detector())
        for key, value in first["model"].items():
            if "running" not in key:  # statistics are of each process's own images
                assert torch.equal(value, second["model"][key]), f"{name} {key}"
        average = read(tmp_path / name / "last.pt")["ema"]
        assert {k: v.shape for k, v in average.state_dict().items()} == {k: v.shape for k, v in first["model"].items()}


def test_the_pruned_model_is_exported(trained: Any, tmp_path: Path) -> None:
    class Predictions(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            predictions: torch.Tensor = first_output(self.model, images)
            return predictions

    average = read(trained[2] / "best.pt")["ema"].float().eval()
    export_onnx(Predictions(average), torch.rand(1, 3, 16, 16), tmp_path / "best.onnx", exporter="torchscript")


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
    assert said == ["best.pt: channels were removed, so the earlier best fitness (1) no longer applies"]


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

    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("yolo_rectangles")
    data = example.make_images(tmp_path, 64, {"train": 16, "val": 4})
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
    assert size(again.model) == sizes[3], "after the removal"
    assert all(torch.equal(keep, resumed.pruner.masks[name]) for name, keep in callback.pruner.masks.items())
    exported = YOLO(weights / "best.pt").export(format="onnx", imgsz=64)
    assert Path(exported).is_file()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ultralytics") is None, reason="ultralytics is not installed")
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("yolo_rectangles")
    monkeypatch.setitem(example.RULE, "start", 0)
    monkeypatch.setitem(example.RULE, "end", 1)
    arguments = ["--out", str(tmp_path), "--epochs", "3", "--size", "64", "--images", "16"]
    callback = example.main(arguments)
    assert callback.pruner.macs.fraction == pytest.approx(0.5, abs=0.01)
    assert "pruned: mAP50-95" in capsys.readouterr().out and (tmp_path / "pruned" / "weights" / "best.onnx").is_file()
