"""A folder that one run at a time writes to: a file with process and host says whose it is."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.files import UnwritableError, read_object, write_text, writing

LOCK = ".lock"
SETTLED = 0.05
"""Seconds after which a run that took over a lock looks whether another one has done so too."""


@dataclass(frozen=True)
class Owner:
    """A process.

    Attributes:
        pid: its number.
        host: its machine.
        began: when it began, in the system's own count; "" where that is not known.
    """

    pid: int
    host: str
    began: str

    @classmethod
    def this(cls) -> Owner:
        """This process."""
        return cls(os.getpid(), socket.gethostname(), _began(os.getpid()))

    @classmethod
    def of(cls, folder: Path) -> Owner | None:
        """Whoever has locked a folder; None for nobody, or for a lock that cannot be read."""
        try:
            found = read_object(folder / LOCK)
            return cls(int(found["pid"]), str(found["host"]), str(found["began"]))
        except (CheckpointError, KeyError, TypeError, ValueError):
            return None

    def runs(self) -> bool:
        """Whether the process is still there; one of another machine always counts as there."""
        if self.host != socket.gethostname():
            return True
        if self.pid == os.getpid():  # given out again
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except (PermissionError, OverflowError):
            return True
        return not self.began or _began(self.pid) in (self.began, "")


def _began(pid: int) -> str:
    """The start of a process, from Linux's /proc: a number that is given out again has another one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def refuse_locked(folder: Path) -> None:
    """Refuse a folder that another run is writing to.

    Raises:
        ConfigError: with that run's process and host.
    """
    owner = Owner.of(folder)
    if owner is not None and owner.runs():
        raise ConfigError(
            f"out: {str(folder)!r} is being written by process {owner.pid} on {owner.host}. Allowed: another --out, or "
            f"wait; if that process is gone, delete {str(folder / LOCK)!r}"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder for this process inside the block, creating it if needed; locks of killed runs are taken over.

    Raises:
        ConfigError: another run is writing to it.
        UnwritableError: the folder cannot be written.
    """
    mine, path = Owner.this(), folder / LOCK
    refuse_locked(folder)
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        try:
            if not there:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            there = True
    if there:
        time.sleep(SETTLED)  # whoever has just made it has written its name by now
        refuse_locked(folder)
    try:
        write_text(path, json.dumps(asdict(mine)) + "\n")
        if there:
            time.sleep(SETTLED)
            refuse_locked(folder)
        yield
    finally:
        if Owner.of(folder) in (mine, None):
            with contextlib.suppress(OSError):
                path.unlink()


def check_mine(folder: Path) -> None:
    """Refuse to write into a folder that is gone, or that another run has been given meanwhile.

    Raises:
        UnwritableError: it is.
    """
    owner = Owner.of(folder)
    if owner != Owner.this():
        lost = "has lost the lock of this run" if folder.is_dir() else "has been deleted"
        what = lost if owner is None else f"is process {owner.pid}'s on {owner.host} by now"
        raise UnwritableError(f"{str(folder)!r} {what}")
