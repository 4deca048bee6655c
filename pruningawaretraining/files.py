"""One way to read files, with one list of what damaged ones raise; one way to write them, whole or not at all.

Every text, JSON, torch and safetensors file of a user is read here, and what is wrong with it becomes one line.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pruningawaretraining.errors import CheckpointError, PruningError

BROKEN = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    AssertionError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
    SafetensorError,
)
"""Errors of readers at damaged or foreign files: the unpickler acts on any byte, parsers recurse."""
LARGEST_TEXT = 256 * 2**20
"""Most bytes of a text file that is read."""


@contextlib.contextmanager
def reading(
    path: str | Path,
    key: str = "",
    allowed: str = "",
    kind: type[PruningError] = CheckpointError,
    *,
    used: bool = False,
) -> Iterator[None]:
    """Turn whatever reading a file raises inside the block into one line.

    Args:
        path: of the file.
        key: the option or key that named it, to begin the message with.
        allowed: what may be given instead, to end it with.
        kind: of the error.
        used: whether what the file holds is put to use in the block too: then its name is added to every error.

    Raises:
        PruningError: of that kind; one that is raised inside stays as it is, unless the file is used.
    """
    start, end = f"{key}: " if key else "", f". Allowed: {allowed}" if allowed else ""
    try:
        yield
    except PruningError as error:
        if not used:
            raise
        raise kind(f"{start}{str(path)!r} cannot be used: {error}{end}") from error
    except BROKEN as error:
        raise kind(f"{start}{str(path)!r} cannot be read: {reason(error)}{end}") from error


class UnwritableError(PruningError, OSError):
    """A file that cannot be written: the disk is full, the folder is read-only or gone."""


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what a full disk, a read-only or a missing folder raises inside the block into one line.

    Raises:
        UnwritableError: the file cannot be written.
    """
    try:
        yield
    except PruningError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have no OSError for a full disk
        raise UnwritableError(f"{str(path)!r} cannot be written: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Why a reader or writer has failed, on one line, without torch's advice to read files of strangers unchecked."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error}"
    text = str(error)
    found = re.search(r"WeightsUnpickler error: (.+)", text)
    if found or "weights_only" in text:
        return found[1].strip().rstrip(".") if found else "it holds more than plain tensors, or is damaged"
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"it is damaged, or of another kind ({type(error).__name__})" if len(line) < 4 else line.rstrip(".")


def read_text(
    path: str | Path, key: str = "", kind: type[PruningError] = CheckpointError, most: int = LARGEST_TEXT
) -> str:
    """The text of a file in UTF-8; a byte order mark is passed over.

    Raises:
        PruningError: of that kind: there is no such file, it is not text, or it is longer than ``most`` bytes.
    """
    with reading(path, key, kind=kind):
        size = os.stat(path).st_size
        if size > most:
            raise kind(f"{key}: ".removeprefix(": ") + f"{str(path)!r} has {size:,} bytes. Allowed: at most {most:,}")
        return Path(path).read_text(encoding="utf-8-sig")


def parse_json(text: str, path: str | Path, key: str = "", kind: type[PruningError] = CheckpointError) -> Any:
    """Parse JSON.

    Raises:
        PruningError: of that kind, with the file that it is from: it is not JSON.
    """
    with reading(path, key, kind=kind):
        return json.loads(text)


def read_json(path: str | Path, key: str = "", kind: type[PruningError] = CheckpointError) -> Any:
    """Read a JSON file; see :func:`read_text` and :func:`parse_json`."""
    return parse_json(read_text(path, key, kind), path, key, kind)


def read_object(path: str | Path, key: str = "", kind: type[PruningError] = CheckpointError) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        PruningError: of that kind: it holds anything else.
    """
    return as_object(read_json(path, key, kind), path, kind)


def as_object(value: Any, path: str | Path, kind: type[PruningError] = CheckpointError) -> dict[str, Any]:
    """A value that has been read from a file, if it is a mapping.

    Raises:
        PruningError: of that kind: it is something else.
    """
    if not isinstance(value, dict):
        raise kind(f"{path}: {type(value).__name__} where a JSON object is expected")
    return value


def read_torch(path: str | Path, key: str = "", allowed: str = "", *, mapped: bool = False) -> Any:
    """Load tensors and plain data that ``torch.save`` wrote, on the CPU. Nothing in the file is executed.

    Args:
        path, key, allowed: as for :func:`reading`.
        mapped: leave the tensors on the disk until they are used, where the format allows it.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it holds more than plain data.
    """
    with reading(path, key, allowed):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except RuntimeError as error:
            if not mapped or "mmap" not in str(error):
                raise
        return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6


def read_torch_mapping(path: str | Path, key: str = "", allowed: str = "") -> dict[str, Any]:
    """The mapping that ``torch.save`` wrote; see :func:`read_torch`.

    Raises:
        CheckpointError: as there, or the file holds anything else.
    """
    values = read_torch(path, key, allowed)
    with reading(path, key, allowed):
        if not isinstance(values, dict):
            raise TypeError(f"it holds a {type(values).__name__}, not a state")
    return dict(values)


def read_safetensors(path: str | Path, key: str = "", allowed: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    with reading(path, key, allowed), safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        return tensors, file.metadata() or {}


def place_of(path: str | Path, key: str = "path", kind: type[PruningError] = UnwritableError) -> Path:
    """Where a file is to be written: symbolic links are followed, so that they stay. Call it before long work.

    Args:
        path: as given.
        key: the argument or option that named it.
        kind: of the error.

    Raises:
        PruningError: of that kind: there is a device, a pipe or a folder, which a file must not replace.
    """
    target = Path(os.path.realpath(path))
    with reading(path, key, kind=kind):
        try:
            mode = os.lstat(target).st_mode
        except FileNotFoundError:
            return target
    if stat.S_ISREG(mode):
        return target
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFLNK: "a circle of links"}
    found = kinds.get(stat.S_IFMT(mode), "a socket" if stat.S_ISSOCK(mode) else "a device")
    raise kind(f"{key}: {str(path)!r} is {found}. Allowed: the path of a file")


def write_atomically(path: str | Path, write: Callable[[str], None]) -> Path:
    """Write a file so that at any moment either the old one or the whole new one is there.

    Args:
        path: where to; its folder is made. A symbolic link stays, and leads to the new file.
        write: writes to the temporary path that it is given.

    Returns:
        The path as given.

    Raises:
        UnwritableError: the disk is full, the folder cannot be written, or there is something else than a file.
    """
    target = place_of(path)
    with writing(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        os.close(handle)
        try:
            write(temporary)
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return Path(path)


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file in one step; see :func:`write_atomically`."""

    def write(temporary: str) -> None:
        Path(temporary).write_text(text, encoding="utf-8")

    return write_atomically(path, write)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
