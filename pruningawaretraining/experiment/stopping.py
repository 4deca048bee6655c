"""Signals that ask a run to end: it writes a checkpoint after the step that it is in, and ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

ASKED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Stopped(KeyboardInterrupt):
    """A signal other than that of Ctrl-C has ended the run."""


class StopRequest:
    """Whether a signal has asked the run to end.

    While steps are taken the signal waits for the end of the step; at any other time, and at the second signal, it
    raises at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._waits = False

    def error(self, text: str = "") -> KeyboardInterrupt:
        """The exception that ends the run: KeyboardInterrupt after Ctrl-C, otherwise :class:`Stopped`."""
        kind = KeyboardInterrupt if self.signal == signal.SIGINT else Stopped
        return kind(text) if text else kind()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside the block the first signal is only noted."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def _on(self, number: int, frame: FrameType | None) -> None:
        waits = self._waits and self.signal is None
        self.signal = number
        if not waits:
            raise self.error()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals inside the block, unless another handler is installed; only in the main thread."""
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in ASKED}
        taken = [number for number, handler in before.items() if handler in DEFAULTS]
        for number in taken:
            signal.signal(number, self._on)
        try:
            yield
        finally:
            for number in taken:
                signal.signal(number, before[number])
