"""SIGINT and SIGTERM: a run ends at a point from which it can go on exactly."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

STDERR = 2
EXIT_STATUS = 130
# A terminal sends Ctrl-C to all processes of a job, and a launcher among them passes it on.
TOGETHER_SECONDS = 1.0


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop. No `Exception`: it is raised in the middle of libraries, which catch those."""


class Interrupts:
    """While installed, a first signal ends the run at the next safe point; a second one ends the process at once.

    agree: of several ranks, tells whether any of them has a signal pending; all ask it together. While it is set, a
    signal takes effect where `anywhere` begins, on all ranks alike, and never within.
    """

    def __init__(self, *, tells: bool = True) -> None:
        """tells: whether a signal is acknowledged on stderr."""
        self.tells = tells
        self.pending = False
        self.agree: Callable[[bool], bool] | None = None
        self._first = -math.inf
        self._inside = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        # Python runs signal handlers in the main thread only; a run in another thread is its owner's to stop.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        repeated = self.agree is None or time.monotonic() - self._first > TOGETHER_SECONDS
        if self.pending and repeated:
            os._exit(EXIT_STATUS)
        if self.pending:
            return
        self.pending, self._first = True, time.monotonic()
        # Straight to the descriptor: a handler may come in the middle of a print.
        if self.tells:
            with suppress(OSError):
                os.write(STDERR, b"\nstopping at the next safe point; a second signal stops at once\n")
        if self._inside:
            raise Interrupted("stopped by a signal")

    @contextmanager
    def anywhere(self) -> Iterator[None]:
        """Inside, a signal takes effect at once: for long work that changes no state, such as sampling."""
        try:
            self._inside = self.agree is None
            if self.pending if self.agree is None else self.agree(self.pending):
                raise Interrupted("stopped by a signal")
            yield
        finally:
            self._inside = False
