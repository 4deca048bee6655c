"""Runs the tests on the lowest or the newest versions that pyproject.toml allows.

    python scripts/test_versions.py [--keep] [--python EXECUTABLE] lowest|newest|both [PYTEST ARGUMENTS]

Each run makes a virtual environment in a temporary folder, installs the package there with its extra ``test``, says
which versions pip found, and starts pytest with the arguments given; without any, the whole ordinary suite. With
``lowest``, everything that has a lower bound (``name>=version``) is held at that bound; what nothing bounds, and with
``newest`` everything, is what pip resolves today. The environment takes several GB and is removed at the end.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BOUNDED = re.compile(r"(?P<name>[\w.-]+?)(?:\[[\w,-]+\])?>=(?P<version>[\d.]+)")
EXTRA = "test"


def requirements(pyproject: str, extra: str = EXTRA) -> list[str]:
    """What a pyproject.toml needs, with one of its extras; read without a TOML parser, which Python 3.10 lacks.

    Raises:
        ValueError: no list of that name.
    """
    found = []
    for key in ("dependencies", extra):
        match = re.search(rf"^{key} = (\[.*?\]$)", pyproject, flags=re.DOTALL | re.MULTILINE)
        if match is None:
            raise ValueError(f"pyproject.toml: no list '{key}'")
        found += ast.literal_eval(match[1])  # a list of strings is written alike in TOML and Python
    return list(dict.fromkeys(found))


def lower_bounds(pyproject: str, extra: str = EXTRA) -> dict[str, str]:
    """Name -> lowest version allowed, of everything that has a lower bound.

    Raises:
        ValueError: one package with two bounds.
    """
    found: dict[str, str] = {}
    for requirement in requirements(pyproject, extra):
        match = BOUNDED.fullmatch(requirement)
        if match and found.setdefault(match["name"], match["version"]) != match["version"]:
            raise ValueError(f"pyproject.toml: two lower bounds for {match['name']}")
    return found


def constraints(which: str, pyproject: str) -> str:
    """The text of pip's constraints file for ``lowest`` or ``newest``."""
    bounds = lower_bounds(pyproject) if which == "lowest" else {}
    return "".join(f"{name}=={version}\n" for name, version in bounds.items())


def pytest_arguments(given: Sequence[str]) -> list[str]:
    """What pytest is started with: what was given, or the whole suite with a process for each core, at most four."""
    return list(given) or ["-q", "-n", str(min(os.cpu_count() or 1, 4))]


def run(command: Sequence[str | Path], check: bool = True) -> int:
    """Run a command at the root of the repository, on nothing but the environment that it names."""
    print("+", shlex.join(map(str, command)), flush=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1", **kept}, check=check).returncode


def installed(python: Path) -> dict[str, str]:
    """Name -> version of everything in an environment."""
    command = [python, "-m", "pip", "list", "--disable-pip-version-check", "--format=json"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {one["name"]: one["version"] for one in json.loads(listed)}


def try_in(folder: Path, which: str, python: str, arguments: Sequence[str]) -> int:
    """Make the environment in a folder, and run the tests there; returns pytest's exit code."""
    run([python, "-m", "venv", folder / "env"])
    own = folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    held = folder / "constraints.txt"
    held.write_text(constraints(which, (ROOT / "pyproject.toml").read_text(encoding="utf-8")), encoding="utf-8")
    install = [own, "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    run([*install, "--upgrade", "pip"])
    run([*install, "-c", held, "-e", f".[{EXTRA}]"])
    versions = ", ".join(f"{name} {version}" for name, version in installed(own).items())
    print(f"{which} versions: {versions}", flush=True)
    return run([own, "-m", "pytest", *arguments], check=False)


def main() -> None:
    """Run the tests as the command line says; the exit code is that of the first run that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave the environment, and say where it is")
    parser.add_argument("--python", default=sys.executable, help="the Python to make the environment with")
    parser.add_argument("which", choices=["lowest", "newest", "both"])
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what pytest is started with")
    args = parser.parse_args()
    codes = []
    for which in ("lowest", "newest") if args.which == "both" else (args.which,):
        folder = Path(tempfile.mkdtemp(prefix=f"pat-{which}-"))
        try:
            codes.append(try_in(folder, which, args.python, pytest_arguments(args.arguments)))
        except subprocess.CalledProcessError as error:
            codes.append(error.returncode)
            print(f"{which}: the environment could not be made; pip names what contradicts or is not there", flush=True)
        finally:
            if args.keep:
                print(f"kept: {folder}")
            else:
                shutil.rmtree(folder)
    raise SystemExit(next((code for code in codes if code), 0))


if __name__ == "__main__":
    main()
