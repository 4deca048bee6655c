"""What configs, run folders and names of strangers can do: nothing is called that does not build a network, nothing is
written outside the folder of the run, and nothing in a table or on a terminal is more than text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from experiment_fixture import tiny
from report_fixture import write_run
from torch import nn
from typer.testing import CliRunner, Result

from pruningawaretraining.cli.main import app
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.experiment.build import find_model
from pruningawaretraining.experiment.inspection import load_inspected
from pruningawaretraining.experiment.schema import ExperimentConfig
from pruningawaretraining.report.numbers import as_csv

FACTORIES = """
from __future__ import annotations
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from torch import nn
if TYPE_CHECKING:
    from nowhere import Shape

class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, width), nn.Linear(width, 2)
    def forward(self, x):
        return self.two(self.one(x))
    @classmethod
    def small(cls) -> Net:
        return cls(2)

def annotated(width: int = 4) -> nn.Module:
    return Net(width)
def as_text(shape: "Shape" = None) -> "Net":
    return Net()
partly = partial(annotated, width=6)

def unannotated():
    Path("called").touch()
    return Net()
def number() -> int:
    Path("called").touch()
    return 1
def nothing() -> None:
    Path("called").touch()
class Plain:
    def __init__(self):
        Path("called").touch()
instance = Net()
value = 3
"""


def pat(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "strangers_models.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "strangers_models", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["Net", "Net.small", "annotated", "as_text", "partly"])
def test_classes_and_functions_that_say_they_give_a_module_are_models(name: str, factories: Path) -> None:
    assert isinstance(find_model(f"strangers_models:{name}")(), nn.Module)


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "os:abort",
        "subprocess:run",
        "subprocess:Popen",
        "shutil:rmtree",
        "builtins:exec",
        "builtins:eval",
        "builtins:dict",
        "torch:load",
        "torch.hub:load",
        "torch.jit:load",
        "pickle:loads",
        "pathlib:Path",
        *(f"strangers_models:{one}" for one in ("unannotated", "number", "nothing", "Plain", "instance", "value")),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "latency", "run"])
def test_nothing_else_is_called(name: str, command: str, factories: Path) -> None:
    values = tiny(model={"name": name, "kwargs": {}})
    values["model"]["kwargs"] = {"command": "touch called"} if name == "os:system" else {}
    (factories / "experiment.yaml").write_text(yaml.safe_dump(values))
    done = pat(command, "experiment.yaml")
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith(f"error: model.name: '{name}'") and "nn.Module" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (factories / "called").exists() and not (factories / "runs").exists()


@pytest.mark.parametrize("name", [":net", "a:", "..a:b", "a b:c", "a:b c", "a/b:c", "a:b()", "a:__class__.__base__"])
def test_names_that_are_no_names_of_python_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="^model.name: "):
        find_model(name)


# --- folders of runs -------------------------------------------------------------------------------------------


def run_folder(folder: Path, name: str) -> Path:
    """A folder of a finished run whose config names a model."""
    folder.mkdir()
    (folder / "summary.json").write_text('{"data": {"shape": [3, 32, 32], "classes": 10}}')
    values = tiny(model={"name": name})
    values["model"]["kwargs"] = {}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


def test_a_run_folder_does_not_choose_what_is_imported(factories: Path) -> None:
    (factories / "imported_by_a_run.py").write_text("from pathlib import Path\nPath('called').touch()\n")
    folder = run_folder(factories / "run", "imported_by_a_run:Net")
    done = pat("latency", folder)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert "model.name: 'imported_by_a_run:Net'" in done.stderr
    assert "Allowed: --model with your own model, or --trust" in done.stderr
    assert not (factories / "called").exists()
    trusted = pat("latency", folder, "--trust")
    assert (factories / "called").exists() and "'Net' is not known" in trusted.stderr


def test_model_takes_the_place_of_what_a_run_folder_names(factories: Path) -> None:
    folder = run_folder(factories / "run", "imported_by_a_run:Net")
    done = pat("latency", folder, "--model", "strangers_models:Net", "--input-shape", "1,3")
    assert "there is no file" in done.stderr and "pruned.safetensors" in done.stderr  # it got as far as the weights


@pytest.mark.parametrize("name", ["resnet18", "timm:resnet18", "pruningawaretraining.experiment.models:digits_resnet"])
def test_run_folders_may_name_models_of_known_packages(name: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", name)
    assert load_inspected(str(folder / "config.yaml"), (1, 3, 32, 32), trusted=False).model is not None


# --- names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../etc", "/etc/passwd", "a/b", "a\\b", "..", ".", "", " ", "a\nb", "\x1b[2J", "x" * 101, ".hidden"]
)
def test_a_name_cannot_leave_the_folder_of_the_runs(name: str) -> None:
    with pytest.raises(ConfigError, match="^name: .*Allowed: "):
        ExperimentConfig.model_validate(tiny(name=name))


@pytest.mark.parametrize("name", ["tiny", "CIFAR-10, ResNet 56", "größer=besser", "v1.2"])
def test_ordinary_names_stay(name: str) -> None:
    assert ExperimentConfig.model_validate(tiny(name=name)).folder() == Path("runs") / name


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
        ("+1", "'+1"),
        ("-1+2", "'-1+2"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        (-0.5, "-0.5"),
        (3, "3"),
        (None, '""'),
        ("conv1", "conv1"),
        (["=1", "b"], "'=1 b"),
        ([-1, 2], "-1 2"),
    ],
)
def test_cells_of_tables_are_no_formulas(cell: Any, written: str) -> None:
    assert as_csv([{"name": cell}]) == f"name\n{written}\n"
    assert as_csv([{"=1": 2}]) == "'=1\n2\n"


@pytest.mark.parametrize("name", ["a[/red]b", "[bold]x", "$\\frac$", "a$b$c"])
def test_marks_in_names_stay_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name.replace("/", "-")).mkdir()
    folder = tmp_path / name.replace("/", "")
    write_run(folder)
    done = pat("analyze", folder, "--out", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    assert name.replace("/", "") in done.output.replace("\n", "")
    assert json.loads((tmp_path / "page.json").read_text())[0]["name"] == name.replace("/", "")
