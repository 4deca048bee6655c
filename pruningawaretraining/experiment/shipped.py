"""The experiments that come with the package."""

from __future__ import annotations

from pathlib import Path

from pruningawaretraining.errors import ConfigError, unknown

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")
"""In an installed package they lie inside it; in a source tree, beside it."""


def shipped_configs() -> dict[str, Path]:
    """Name -> file of every experiment that comes with the package."""
    folder = next((folder for folder in FOLDERS if (folder / "demo.yaml").is_file()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def named(source: str) -> str:
    """The file of a shipped experiment by its name; any other name or path as it is."""
    return str(shipped_configs().get(source, source))


def is_experiment(source: str) -> bool:
    """Whether a source is the file of an experiment, by its ending, and not a model by name."""
    return Path(source).suffix.lower() in (".yaml", ".yml", ".json")


def find_config(name: str) -> Path:
    """The file that a user means: a path, or the name of a shipped experiment if no such path exists.

    Raises:
        ConfigError: there is neither, and it does not look like a path.
    """
    path, shipped = Path(name), shipped_configs()
    if path.suffix or len(path.parts) > 1 or path.is_file():
        return path
    if name not in shipped:
        if path.exists():
            return path
        raise ConfigError(unknown("config", name, shipped) + ", or the path of a .yaml or .json file")
    return shipped[name]
