"""SIGINT and SIGTERM: a run ends at a point from which it can go on exactly."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from retrain.types import RetrainError


class Interrupted(RetrainError):
    """The run was asked to stop and has written a checkpoint."""

    exit_status = 130


class Interrupts:
    """While installed, a first signal ends the run at the next safe point; a second one ends the process at once."""

    def __init__(self) -> None:
        self.pending = False
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
        if self.pending:
            os._exit(130)
        self.pending = True
        if self._inside:
            raise Interrupted("stopped by a signal")

    @contextmanager
    def anywhere(self) -> Iterator[None]:
        """Inside, a signal takes effect at once: for long work that changes no state, such as sampling."""
        if self.pending:
            raise Interrupted("stopped by a signal")
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
