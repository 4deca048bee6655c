"""The versions that pyproject.toml allows: what the docs say of them, and the script that runs the tests on them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
SCRIPT = ROOT / "scripts" / "test_versions.py"

spec = importlib.util.spec_from_file_location("versions_script", SCRIPT)
assert spec is not None and spec.loader is not None
versions = importlib.util.module_from_spec(spec)
spec.loader.exec_module(versions)

SAMPLE = """
dependencies = [
    "torch>=2.6",  # a comment
    "free",
]
[project.optional-dependencies]
docs = ["other[python]>=0.25"]
test = [
    "pytest>=8",
    "torch>=2.6",
]
"""


def release(version: str) -> tuple[int, ...]:
    """A version as numbers; zeros at its end do not count."""
    numbers = [int(part) for part in version.split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def test_bounds_are_read_with_those_of_an_extra():
    assert versions.requirements(SAMPLE) == ["torch>=2.6", "free", "pytest>=8"]
    assert versions.lower_bounds(SAMPLE) == {"torch": "2.6", "pytest": "8"}
    assert versions.lower_bounds(SAMPLE, "docs") == {"torch": "2.6", "other": "0.25"}
    assert versions.constraints("lowest", SAMPLE) == "torch==2.6\npytest==8\n"
    assert versions.constraints("newest", SAMPLE) == ""


def test_two_bounds_and_a_missing_list_are_refused():
    with pytest.raises(ValueError, match="two lower bounds for torch"):
        versions.lower_bounds(SAMPLE.replace('"pytest>=8",\n    "torch>=2.6"', '"torch>=2.7"'))
    with pytest.raises(ValueError, match="no list 'lint'"):
        versions.requirements(SAMPLE, "lint")


def test_everything_that_is_needed_has_a_lower_bound_and_everywhere_the_same():
    named = re.findall(r'^(?:    |\w+ = \[)"([^">\n]+)>=([\d.]+)"', PYPROJECT, flags=re.MULTILINE)
    bounds = {name.partition("[")[0]: version for name, version in named}
    assert {(name.partition("[")[0], version) for name, version in named} == set(bounds.items())
    assert versions.lower_bounds(PYPROJECT).items() <= bounds.items()
    without = [one for one in versions.requirements(PYPROJECT) if ">=" not in one]
    assert without == ["types-PyYAML"]


def test_python_versions_are_those_of_the_classifiers_and_the_readme():
    lowest = re.findall(r'^requires-python = ">=3\.(\d+)"$', PYPROJECT, flags=re.MULTILINE)
    listed = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', PYPROJECT)
    assert [int(one) for one in listed] == [*range(int(lowest[0]), int(lowest[0]) + len(listed))]
    assert f'target-version = "py3{lowest[0]}"' in PYPROJECT
    torch = versions.lower_bounds(PYPROJECT)["torch"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Python 3.{lowest[0]} or newer and PyTorch {torch} or newer" in readme


def test_versions_that_the_docs_call_tested_are_the_bounds():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    row = re.findall(r"^\| [\d-]+ \| [\d.]+ \| lowest: ([^|]*) \| [\d,]+ passed, [^|]+ \|$", text, re.MULTILINE)
    named = dict(one.split(" ") for one in row[0].split(", "))
    bounds = versions.lower_bounds(PYPROJECT)
    assert {"torch", "torchvision", "numpy", "onnx", "onnxruntime"} <= named.keys()
    assert {name: release(version) for name, version in named.items()} == {
        name: release(bounds[name]) for name in named
    }, "run: make test-lowest"
    newest = re.search(r"\| newest: torch (\d+\.\d+)", text)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert newest is not None and f"ested with PyTorch {bounds['torch']} and {newest[1]}" in readme


@pytest.mark.parametrize(("keep", "broken"), [(False, False), (True, False), (False, True)])
def test_the_script_installs_tests_and_cleans_up(
    keep: bool, broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def run(command: Sequence[str | Path], check: bool = True) -> int:
        commands.append([str(one) for one in command])
        if "-c" in commands[-1]:
            held = Path(commands[-1][commands[-1].index("-c") + 1]).read_text(encoding="utf-8")
            assert held == versions.constraints("lowest", PYPROJECT)
            if broken:
                raise subprocess.CalledProcessError(1, commands[-1])
        return 3 if "pytest" in command else 0

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(versions, "run", run)
    monkeypatch.setattr(versions, "installed", lambda python: {"torch": "2.6.0"})
    line = [str(SCRIPT), *(["--keep"] if keep else []), "lowest", "tests/test_x.py", "-k", "some", "--keep"]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(SystemExit) as stop:
        versions.main()
    left = list(tmp_path.iterdir())
    assert stop.value.code == (1 if broken else 3)
    assert bool(left) == keep
    out = capsys.readouterr().out
    if broken:
        assert "the environment could not be made" in out
        return
    assert commands[0][1:3] == ["-m", "venv"]
    assert commands[-1][1:] == ["-m", "pytest", "tests/test_x.py", "-k", "some", "--keep"]
    own = Path(commands[0][3]) / ("Scripts" if os.name == "nt" else "bin") / "python"
    assert {command[0] for command in commands[1:]} == {str(own)}
    assert "lowest versions: torch 2.6.0" in out
    assert (f"kept: {left[0]}" in out) if keep else "kept" not in out
