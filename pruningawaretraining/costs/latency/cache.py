"""Measured times on disk: one small JSON file for each thing that was timed, in the user's cache folder.

A file is named by the hash of what was timed and where (machine, runtime, version, threads), and holds that text too.
It is put in place in one step, so processes that write at once leave one whole file; a damaged one counts as absent.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/pruningawaretraining/latency``, or the same under ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    return base / "pruningawaretraining" / "latency"


@functools.cache
def machine() -> str:
    """The processor and its number of cores: times of another machine do not count."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{platform.system()} {platform.machine()} {name} x{os.cpu_count()}"


@dataclass(frozen=True)
class TimeCache:
    """Times of one runtime on one machine.

    Args:
        where: what the times belong to besides the thing itself: runtime, version, threads, machine.
        folder: of the files.
    """

    where: Mapping[str, Any]
    folder: Path = field(default_factory=cache_folder)

    def get(self, what: Mapping[str, Any]) -> Any | None:
        """The stored value, or None."""
        text = self._text(what)
        try:
            found = json.loads(self._path(text).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found.get("times") if isinstance(found, dict) and found.get("what") == text else None

    def put(self, what: Mapping[str, Any], times: Any) -> None:
        """Store it. A folder that cannot be written is passed over: it is measured again next time."""
        text = self._text(what)
        path = self._path(text)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".", dir=self.folder)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"what": text, "times": times}, file)
            os.replace(name, path)
        except OSError as error:
            logger.info("%s: times are not kept: %s", path, error)

    def _text(self, what: Mapping[str, Any]) -> str:
        return json.dumps({"where": dict(self.where), "what": dict(what)}, sort_keys=True)

    def _path(self, text: str) -> Path:
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
