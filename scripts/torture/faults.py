"""Inside the process under test: every change that it makes to a folder is counted, and one of them is its last.

The product knows nothing of this. Changes are seen by Python's audit events (open for writing, rename, remove, mkdir,
rmdir, truncate), by `os.fsync`, and by the writes of files that are opened through `open`.
"""

from __future__ import annotations

import builtins
import datetime
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Death:
    """SIGKILL just before change number `at` (from 0).

    torn: a write that comes next gets half of its bytes to the file. power: as with a power cut, what was appended to
    a file since its last fsync is lost: by turns cut off, or read as zeros.
    """

    at: int
    torn: bool = False
    power: bool = False


@dataclass
class Watch:
    """Counts the changes below `folder`. points: what each of them was, in their order."""

    folder: Path
    death: Death | None = None
    points: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._prefix = str(self.folder.resolve())
        self._unsynced: dict[int, tuple[int, int]] = {}

    def install(self) -> None:
        """For the rest of this process: an audit hook cannot be taken away."""
        sys.addaudithook(self._audit)
        fsync, really_open = os.fsync, io.open

        def watched_fsync(descriptor: Any) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            self.point("fsync", _path_of(number))
            fsync(number)
            self._synced(number)

        def watched_open(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+") or not self._inside(os.fsdecode(file)):
                return really_open(file, mode, buffering, *rest, **more)
            assert "+" not in mode, "a way of writing that is not watched"
            raw = _WatchedFile(self, file, mode.replace("b", "").replace("t", ""))
            if buffering == 0:
                return raw
            buffered = io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *rest, **more)

        os.fsync = watched_fsync
        io.open = builtins.open = watched_open  # pyright: ignore[reportAttributeAccessIssue]

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & WRITING and not isinstance(path, int):
                self.point("open", os.fsdecode(path))
        elif event in CHANGES:
            path, where = arguments[0], arguments[-1]
            name = _path_of(path) if isinstance(path, int) else os.fsdecode(path)
            # The last argument of these is the folder that the path is relative to, -1 for none.
            if event in ("os.remove", "os.rmdir", "os.mkdir", "os.rename") and isinstance(where, int) and where >= 0:
                name = f"{_path_of(where)}/{name}"
            self.point(event.removeprefix("os."), name)

    def _inside(self, path: str) -> bool:
        return os.path.abspath(path).startswith(self._prefix)  # noqa: PTH100 - a Path would be made at every open

    def point(self, what: str, path: str, tear: Callable[[], object] | None = None) -> None:
        if not self._inside(path):
            return
        self.points.append(f"{what} {os.path.relpath(path, self._prefix)}")
        if self.death is not None and len(self.points) == self.death.at + 1:
            if self.death.torn and tear is not None:
                tear()
            if self.death.power:
                self._power_cut()
            os.kill(os.getpid(), signal.SIGKILL)

    def _synced(self, descriptor: int) -> None:
        """All that is in the file now stays; what is appended from here on does not."""
        facts = os.fstat(descriptor)
        if facts.st_ino in self._unsynced:
            self._unsynced[facts.st_ino] = (self._unsynced[facts.st_ino][0], facts.st_size)

    def opened(self, descriptor: int) -> None:
        """Remember how long the file is before anything is written that is not synced."""
        facts = os.fstat(descriptor)
        if self.death is not None and self.death.power and facts.st_ino not in self._unsynced:
            self._unsynced[facts.st_ino] = (os.dup(descriptor), facts.st_size)

    def _power_cut(self) -> None:
        for turn, (descriptor, size) in enumerate(self._unsynced.values()):
            end = os.fstat(descriptor).st_size
            os.ftruncate(descriptor, min(size, end))
            if turn % 2:
                os.ftruncate(descriptor, end)


class _WatchedFile(io.FileIO):
    def __init__(self, watch: Watch, file: Any, mode: str) -> None:
        super().__init__(file, mode)
        self._watch = watch
        watch.opened(self.fileno())

    def write(self, data: Any) -> int:
        view = memoryview(data)
        write = super().write
        self._watch.point("write", os.fsdecode(self.name), tear=lambda: write(view[: len(view) // 2]))
        return write(view)


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115


def jumping_clock() -> None:
    """From now on the clock on the wall jumps at every look: an hour on, a day back, thirty years back, and so on."""
    jumps = (0, 3600, -86400, -30 * 365 * 86400, 7200, 86400 * 3650, -1)
    really, looks = time.time, iter(range(10**9))

    def wall() -> float:
        return really() + jumps[next(looks) % len(jumps)]

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Jumping:
            return cls.fromtimestamp(wall(), tz)

    time.time = wall
    time.time_ns = lambda: int(wall() * 1e9)
    datetime.datetime = Jumping
    for module in list(sys.modules.values()):
        if module.__name__.startswith("retrain.") and getattr(module, "datetime", None) is Jumping.__mro__[1]:
            module.datetime = Jumping  # pyright: ignore[reportAttributeAccessIssue]
