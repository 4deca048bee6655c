"""Read configs of any source and dialect; nothing is written."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import yaml

from pruningawaretraining.config import dialects  # noqa: F401  (importing it registers the dialects)
from pruningawaretraining.config.caps import anchored_caps
from pruningawaretraining.config.dialects.base import Dialect, note_ignored
from pruningawaretraining.config.dialects.sparseml_unread import tell_of_variables
from pruningawaretraining.config.extent import MOST_BYTES, check_extent
from pruningawaretraining.config.lines import with_place
from pruningawaretraining.config.schema import PruningConfig, Rule
from pruningawaretraining.config.yaml_form import loader_for
from pruningawaretraining.errors import ConfigError, nearest
from pruningawaretraining.files import BROKEN, read_text, reading, reason
from pruningawaretraining.registry import build, calling, check_returned, names

TRAINING = frozenset(
    [
        "aa",
        "amp",
        "clip_grad",
        "color_jitter",
        "cooldown_epochs",
        "crop_pct",
        "cutmix",
        "drop_path",
        "gradient_accumulation_steps",
        "learning_rate",
        "logging_steps",
        "lr_scheduler_type",
        "min_lr",
        "mixup",
        "model_ema",
        "native_amp",
        "num_train_epochs",
        "opt",
        "per_device_train_batch_size",
        "pin_mem",
        "remode",
        "reprob",
        "save_steps",
        "sched",
        "smoothing",
        "warmup_lr",
        "warmup_steps",
        "workers",
    ]
)
"""Keys of training settings (timm's and transformers') that no form and no experiment has."""
LEAST = 3
"""So many of them make a file training settings."""
MOST_KEYS = 8
"""How many keys of a config that nothing recognises are shown."""
FILE_NAMES = ("pruning_config.json", "pruning_config.yaml", "pruning_config.yml")


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any] | PruningConfig, variables: Mapping[str, Any] | None = None
) -> PruningConfig:
    """The config that ``source`` holds, in the native form.

    Args:
        source: a path (.json, .yaml, .yml, or .md that begins with YAML), a folder with a pruning_config.json, .yaml or
            .yml, a mapping, or a PruningConfig, which is given back as it is. Neither the file nor the mapping is
            changed.
        variables: what a recipe reads as ``eval(name)``, before its own values; other forms have no variables.

    Raises:
        ConfigError: the file is missing, cannot be parsed, or holds a key or value that is not allowed. One
            line for each problem, beginning with the file's path if there is one.
    """
    if isinstance(source, PruningConfig):
        return source
    if isinstance(source, Mapping):
        return translate(with_variables(source, variables))
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(f"config: {source!r} is neither a path, a mapping nor a PruningConfig")
    path = find_file(source)
    mapping = with_variables(anchored_caps(read_mapping(path), path.parent), variables)
    with placed(path):
        return translate(mapping)


@contextmanager
def placed(path: Path) -> Iterator[None]:
    """Errors begin with the file, and the line of the key that they name."""
    try:
        yield
    except ConfigError as error:
        text = read_text(path, "config", ConfigError, MOST_BYTES)
        if path.suffix.lower() == ".md":
            text = re.sub(r"\A\s*---", "   ", text).partition("\n---")[0]
        raise ConfigError(with_place(path, text, str(error))) from error


def translate(mapping: Mapping[str, Any]) -> PruningConfig:
    """A mapping in any known form as a native config.

    Raises:
        ConfigError: no form is recognised, or a key or value is not allowed.
    """
    check_extent(mapping)
    mapping = _copied(mapping)
    if "rules" in mapping:
        return PruningConfig.model_validate(mapping)
    known: dict[str, Dialect] = {name: build("dialect", name) for name in names("dialect")}
    for dialect in known.values():
        with calling("dialect", dialect, "true or false"):
            mine = dialect.recognises(mapping)
        if mine:
            with calling("dialect", dialect, "a PruningConfig, made by native(rules)"):
                found: Any = dialect.translate(mapping)
            good = isinstance(found, PruningConfig)
            check_returned(good, "dialect", dialect, found, "a PruningConfig, made by native(rules)")
            return cast("PruningConfig", found)
    raise ConfigError(_unrecognised(mapping, known))


def _copied(value: Any) -> Any:
    """A copy of nested plain data in which every key is text, as YAML's are: ``{0.8: [...]}`` names something."""
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): _copied(inner) for key, inner in value.items()}
    return [_copied(one) for one in value] if type(value) is list else copy.deepcopy(value)


def with_variables(mapping: Mapping[str, Any], variables: Mapping[str, Any] | None) -> dict[str, Any]:
    """A recipe with variables in place of its own of the same names; another form as it is."""
    if not variables:
        return dict(mapping)
    if (form := form_of(mapping)) == "sparseml":
        tell_of_variables(mapping, variables)
        return {**mapping, **variables}
    for name in variables:
        note_ignored(name, f"configs of the form {form or 'given'} have no variables")
    return dict(mapping)


def form_of(mapping: Mapping[str, Any]) -> str | None:
    """The form that a config is written in: "native", the name of a dialect, or None where nothing recognises it."""
    if "rules" in mapping:
        return "native"
    return next((name for name in names("dialect") if build("dialect", name).recognises(mapping)), None)


def training_settings(mapping: Mapping[str, Any]) -> list[str]:
    """The keys by which a mapping shows itself as settings of a training; none where it does not."""
    found = [key for key in mapping if key in TRAINING]
    return found if len(found) >= LEAST else []


def _unrecognised(mapping: Mapping[str, Any], known: Mapping[str, Dialect]) -> str:
    native = list(PruningConfig.model_fields)
    allowed = [*native, *(key for dialect in known.values() for key in dialect.keys)]
    seen = [key for key in mapping if key != "$schema"]
    if not seen:
        return "config: it is empty. Allowed: 'rules', or the keys of another form (" + ", ".join(known) + ")"
    if all(key in Rule.model_fields for key in seen):
        keys = ", ".join(repr(key) for key in seen[:MOST_KEYS])
        return f"config: {keys}: {'keys' if len(seen) > 1 else 'a key'} of a rule. Allowed: wrap it in rules: [{{...}}]"
    if training := training_settings(mapping):
        shown = ", ".join(repr(key) for key in training[:MOST_KEYS])
        what = f"config: {shown} are settings of a training, and there is no pruning config"
        return f"{what}. Allowed: 'rules', or another form ({', '.join(known)})"
    close = {key: nearest(key, allowed) for key in seen[:MOST_KEYS] if key not in allowed}
    hints = [f"did you mean {match!r} for {key!r}?" for key, match in close.items() if match]
    shown = ", ".join(repr(key) for key in seen[:MOST_KEYS]) + (", ..." if len(seen) > MOST_KEYS else "")
    hint = f"; {' '.join(hints)}" if hints else ""
    return f"config: no form has the keys {shown}{hint} Allowed: 'rules', or another form ({', '.join(known)})"


def find_file(path: str | os.PathLike[str]) -> Path:
    """The file itself, or the one in a folder; ``~`` is the user's home.

    Raises:
        ConfigError: no file, several, another extension, or no permission.
    """
    with reading(os.fspath(path), "config", kind=ConfigError):
        return _find_file(Path(os.path.expanduser(path)))


def _find_file(path: Path) -> Path:
    if path.is_dir():
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if len(found) == 1:
            return found[0]
        what = f"holds {len(found)} configs" if found else "holds no config"
        raise ConfigError(f"config: the folder {str(path)!r} {what}. Allowed: one of {', '.join(FILE_NAMES)}")
    if not path.is_file():
        beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        close = nearest(path.name, beside)
        raise ConfigError(f"config: there is no {str(path)!r}" + (f"; did you mean {close!r}?" if close else ""))
    if path.suffix.lower() not in PARSERS:
        raise ConfigError(f"config: {str(path)!r} has the extension {path.suffix!r}. Allowed: {', '.join(PARSERS)}")
    return path


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a mapping from a JSON or YAML file.

    Raises:
        ConfigError: it cannot be read or parsed (with line and column), or is not a mapping.
    """
    return parse_mapping(read_text(path, "config", ConfigError, MOST_BYTES), path)


def parse_mapping(text: str, path: Path) -> dict[str, Any]:
    """Parse a mapping from JSON or YAML, by the extension of its file.

    Raises:
        ConfigError: it cannot be parsed (with line and column), is not a mapping, or is too large; see
            :mod:`pruningawaretraining.config.extent`.
    """
    try:
        values = PARSERS[path.suffix.lower()](text)
        check_extent(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except BROKEN as error:
        raise ConfigError(f"{path}: it cannot be parsed: {reason(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: it holds {_shown(values)}. Allowed: a mapping of keys to values")
    return values


def _shown(values: Any) -> str:
    return "nothing" if values is None else f"a {type(values).__name__}"


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates) if text.strip() else None
    except json.JSONDecodeError as error:
        raise ConfigError(f"line {error.lineno}, column {error.colno}: {error.msg}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ConfigError(f"{key}: given twice, with {seen[key]!r} and {value!r}")
        seen[key] = value
    return seen


def _parse_yaml(text: str) -> Any:
    tags = {tag for name in names("dialect") for tag in build("dialect", name).yaml_tags}
    try:
        return yaml.load(text, Loader=loader_for(tags))  # noqa: S506  (a SafeLoader with the dialects' tags)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{where}{error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(" ".join(str(error).split())) from error


def _parse_markdown(text: str) -> Any:
    """The YAML between the two lines of dashes that a page may begin with."""
    lines = text.splitlines()
    marks = [number for number, line in enumerate(lines) if line.rstrip() == "---"]
    if len(marks) < 2 or any(line.strip() for line in lines[: marks[0]]):
        raise ConfigError("no YAML at its beginning. Allowed: a recipe between two lines of '---'")
    return _parse_yaml("\n".join(lines[marks[0] + 1 : marks[1]]))


PARSERS: dict[str, Callable[[str], Any]] = {
    ".json": _parse_json, ".yaml": _parse_yaml, ".yml": _parse_yaml, ".md": _parse_markdown
}  # fmt: skip
