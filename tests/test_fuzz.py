"""Fuzzers of everything that is read from outside: configs, checkpoints, states of pruners, folders of runs.

Whatever they make is either taken or refused with a PruningError of one screen: nothing else is raised, nothing hangs,
and what is refused has changed nothing. Every fuzzer runs small here and large as a slow test, each time with the same
examples. ``scripts/reliability.py`` writes the counts of the large ones into docs/reliability.md.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from experiment_fixture import tiny
from torch import nn

from pruningawaretraining import Pruning, load_config, load_pruned, load_state_dict_pruned, save_pruned
from pruningawaretraining.checkpoint.files import KEY, read_file
from pruningawaretraining.config.load import read_mapping
from pruningawaretraining.errors import PruningError
from pruningawaretraining.experiment import record
from pruningawaretraining.experiment.models import DigitsResNet
from pruningawaretraining.experiment.run import run_experiment
from pruningawaretraining.experiment.schema import ExperimentConfig, load_experiment
from pruningawaretraining.experiment.timing import candidates
from pruningawaretraining.files import read_torch
from pruningawaretraining.report.html import write_report

pytest.importorskip("hypothesis")

from fuzzing import Tally, assert_same, contents, damaged, fixed, hostile, mutated  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
IMAGE = torch.zeros(1, 1, 8, 8)


def sizes(small: int, large: int) -> Callable[[Any], Any]:
    """Run a fuzzer with few examples, and with many as a slow test."""
    return pytest.mark.parametrize("examples", [small, pytest.param(large, marks=pytest.mark.slow)])


# --- configs ---------------------------------------------------------------------------------------------------


def seeds() -> list[dict[str, Any]]:
    """Configs of every form that are taken as they are."""
    files = [path for suffix in ("json", "yaml") for path in sorted(DATA.rglob(f"*.{suffix}"))]
    found = [read_mapping(path) for path in files if "golden" not in path.name]
    found += [{**tiny(), "pruning": one} for one in found[:4]] + [tiny(), read_mapping(ROOT / "configs" / "demo.yaml")]
    found.append({"rules": [{"pattern": {"type": "slice", "block_size": 4}, "criterion": {"type": "taylor"}, "end": 4,
                             "regularizer": {"type": "growing_l2", "strength": 1e-3}, "layers": ["re:.*conv"],
                             "max_sparsity_from": {"conv1": 0.5}, "target": {"sparsity": 0.5, "macs": 0.5}}],
                  "example_inputs": {"shape": [1, 3, 8, 8]}, "distillation": {"features": ["a"]}})  # fmt: skip
    return found


SEEDS = seeds()
TEXTS = [dump(one).encode() for one in SEEDS for dump in (json.dumps, yaml.safe_dump)]


@sizes(150, 7000)
def test_configs_as_mappings(examples: int) -> None:
    tally = Tally("configs, as mappings")

    @fixed(examples)
    @given(mutated(st.sampled_from(SEEDS)))
    def fuzz(values: Any) -> None:
        before = copy.deepcopy(values)
        tally.answer(lambda: load_experiment(values) if "pruning" in values else load_config(values))
        assert repr(values) == repr(before)

    fuzz()
    tally.write()


@sizes(100, 3000)
def test_configs_as_files(examples: int, tmp_path: Path) -> None:
    tally = Tally("configs, as damaged files")

    @fixed(examples)
    @given(damaged(st.sampled_from(TEXTS)), st.sampled_from((".json", ".yaml", ".yml")), st.booleans())
    def fuzz(content: bytes, suffix: str, experiment: bool) -> None:
        path = tmp_path / f"config{suffix}"
        path.write_bytes(content)
        tally.answer(lambda: load_experiment(path) if experiment else load_config(path))
        assert path.read_bytes() == content

    fuzz()
    tally.write()


# --- checkpoints -----------------------------------------------------------------------------------------------


def net() -> DigitsResNet:
    torch.manual_seed(0)
    return DigitsResNet(widths=(8, 16), blocks=1)


def trained(config: dict[str, Any], epochs: int) -> tuple[nn.Module, torch.optim.Optimizer, Pruning]:
    """A model in training under a config, after some epochs of one step each."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    pruner = Pruning(model, config, example_inputs=IMAGE, optimizer=optimizer)
    for epoch in range(epochs):
        optimizer.zero_grad()
        images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(epoch))
        nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
        optimizer.step()
        pruner.prune(model, epoch)
    return model, optimizer, pruner


CHANNELS = {"rules": [{"target": {"macs": 0.6}, "end": 2}]}


def assert_runs_or_same(model: nn.Module, before: dict[str, Any], answer: Any) -> None:
    if isinstance(answer, PruningError):
        assert_same(before, contents(model))
    else:
        model.eval()
        with torch.no_grad():
            model(IMAGE)


widths = hostile | st.integers(-2, 40) | st.lists(st.integers(-2, 40), max_size=3)


@sizes(30, 500)
def test_checkpoints_of_pruned_models(examples: int, tmp_path: Path) -> None:
    tally, path = Tally("checkpoints of save_pruned"), tmp_path / "m.safetensors"
    save_pruned(trained(CHANNELS, 4)[0], path)
    whole, description = path.read_bytes(), read_file(path)[1]
    tensors = {name: value.clone() for name, value in load_file(path).items()}  # the file is written anew

    @fixed(examples)
    @given(damaged(st.just(whole)) | mutated(st.just(description), widths) | reshaped(tensors))
    def fuzz(found: Any) -> None:
        if isinstance(found, bytes):
            path.write_bytes(found)
        elif "aliases" in found or not all(isinstance(one, torch.Tensor) for one in found.values()):
            save_file(tensors, path, {KEY: json.dumps(found, default=repr)})
        else:
            save_file(found, path, {KEY: json.dumps(description)})
        model = net()
        before = contents(model)
        assert_runs_or_same(model, before, tally.answer(lambda: load_pruned(model, path)))

    fuzz()
    tally.write()


@st.composite
def reshaped(draw: st.DrawFn, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of which one or two have another shape or type, another name, or are lost."""
    found = dict(tensors)
    for name in draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=2, unique=True)):
        shape = list(tensors[name].shape)
        kind = draw(st.sampled_from(("shape", "lose", "rename", "type", "dimensions")))
        if kind == "lose":
            del found[name]
        elif kind == "rename":
            found[f"{name}x"] = found.pop(name)
        elif kind == "type":
            found[name] = tensors[name].to(draw(st.sampled_from((torch.int64, torch.bool, torch.float32))))
        elif kind == "dimensions" or not shape:
            found[name] = torch.zeros(draw(st.lists(st.integers(0, 4), max_size=5)))
        else:
            shape[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(0, 20))
            found[name] = torch.zeros(shape, dtype=tensors[name].dtype)
    return found


@sizes(30, 500)
def test_plain_state_dicts(examples: int, tmp_path: Path) -> None:
    tally, path = Tally("plain state dicts"), tmp_path / "w.pt"
    state = {name: value.clone() for name, value in trained(CHANNELS, 4)[0].state_dict().items()}
    torch.save(state, path)
    whole = path.read_bytes()

    @fixed(examples)
    @given(damaged(st.just(whole)) | reshaped(state) | mutated(st.just({"state": 1, "more": [1]})))
    def fuzz(found: Any) -> None:
        if isinstance(found, bytes):
            path.write_bytes(found)
        else:
            torch.save(found, path)
        model = net()
        before = contents(model)
        answer = tally.answer(lambda: load_state_dict_pruned(model, read_torch(path)))
        assert_runs_or_same(model, before, answer)

    fuzz()
    tally.write()


# --- states of pruners -----------------------------------------------------------------------------------------

BOTH = {
    "rules": [
        {"target": {"macs": 0.6}, "start": 1, "end": 3, "regularizer": "growing_l2"},
        {"pattern": "2:4", "layers": ["re:stages.*conv2"], "target": {"sparsity": 0.5}, "start": 1, "end": 5},
    ]
}


def everything(run: tuple[nn.Module, torch.optim.Optimizer, Pruning]) -> dict[str, Any]:
    """Model, optimizer and masks."""
    model, optimizer, pruner = run
    momenta = {
        f"momentum {number}": state["momentum_buffer"].clone()
        for number, state in optimizer.state_dict()["state"].items()
        if state.get("momentum_buffer") is not None
    }
    masks = {f"mask {name}": mask.clone() for name, mask in pruner.masks.items()}
    return {**contents(model), **momenta, **masks, "phase": pruner.phase}


@sizes(25, 500)
def test_states_of_pruners(examples: int) -> None:
    tally = Tally("states of pruners")
    states = [trained(config, epochs)[2].state_dict() for config in (CHANNELS, BOTH) for epochs in (2, 4)]
    configs = [CHANNELS, CHANNELS, BOTH, BOTH]

    @fixed(examples)
    @given(st.integers(0, 3).flatmap(lambda n: st.tuples(st.just(n), mutated(st.just(states[n])))))
    def fuzz(found: tuple[int, Any]) -> None:
        number, state = found
        run = trained(configs[number], 1)
        before = everything(run)
        answer = tally.answer(lambda: run[2].load_state_dict(state))
        if isinstance(answer, PruningError):
            assert_same(before, everything(run))
        else:
            run[0](IMAGE)

    fuzz()
    tally.write()


# --- folders of runs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """A finished run, and one that lacks its summary."""
    base = tmp_path_factory.mktemp("folders")
    run_experiment(experiment(base / "finished"))
    shutil.copytree(base / "finished", base / "unfinished")
    (base / "unfinished" / record.SUMMARY).unlink()
    yield [base / "finished", base / "unfinished"]


def experiment(folder: Path) -> ExperimentConfig:
    changes = {"epochs": 2, "dense_baseline": False, "latency": None, "onnx": None, "data": {"train_fraction": 0.1}}
    rules = [{"end": 1, "target": {"macs": 0.8}}]
    return ExperimentConfig.model_validate(tiny(out=str(folder), pruning={"rules": rules}, **changes))


READ = (record.SUMMARY, record.CONFIG, record.METRICS, record.NORMS, record.CHECKPOINT, record.PRUNED, record.DENSE)


@st.composite
def broken_folder(draw: st.DrawFn, folders: list[Path]) -> tuple[int, dict[str, bytes | None]]:
    """Which folder, and files of it with other contents, or None for those that are taken away."""
    number = draw(st.integers(0, len(folders) - 1))
    names = [name for name in READ if (folders[number] / name).is_file()]
    changes: dict[str, bytes | None] = {}
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
        whole = (folders[number] / name).read_bytes()
        kind = draw(st.sampled_from(("damage", "damage", "mutate", "lose", "empty")))
        if kind == "mutate" and name.endswith(".json"):
            found = draw(mutated(st.just(json.loads(whole))))
            changes[name] = json.dumps(found, default=repr).encode("utf-8", "surrogatepass")
        elif kind == "mutate" and name == record.CHECKPOINT:
            state = torch.load(folders[number] / name, weights_only=True)
            with tempfile.TemporaryDirectory() as base:
                torch.save(draw(mutated(st.just(state))), Path(base) / name)
                changes[name] = (Path(base) / name).read_bytes()
        elif kind == "lose":
            changes[name] = None
        else:
            changes[name] = b"" if kind == "empty" else draw(damaged(st.just(whole)))
    return number, changes


@sizes(12, 300)
def test_folders_of_runs(examples: int, folders: list[Path], tmp_path: Path) -> None:
    tally, uses = Tally("folders of runs"), ("resume", "report", "latency", "analyze")

    @fixed(examples)
    @given(broken_folder(folders), st.sampled_from(uses))
    def fuzz(found: tuple[int, dict[str, bytes | None]], use: str) -> None:
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folders[found[0]], folder)
        for name, content in found[1].items():
            (folder / name).unlink()
            if content is not None:
                (folder / name).write_bytes(content)
        tally.answer(lambda: use_folder(folder, use, experiment(folders[1])))

    fuzz()
    tally.write()


def use_folder(folder: Path, use: str, config: ExperimentConfig) -> Any:
    if use == "resume":
        return run_experiment(config.model_copy(update={"out": str(folder)}), resume=True)
    if use == "report":
        return write_report(folder)
    if use == "latency":
        return candidates([str(folder)])
    from pruningawaretraining.analysis.compare import write_comparison
    from pruningawaretraining.analysis.sources import load_sources

    model = "pruningawaretraining.experiment.models:digits_resnet"
    return write_comparison(load_sources([folder], model, (1, 1, 8, 8)), folder / "page.html", "fuzz")
