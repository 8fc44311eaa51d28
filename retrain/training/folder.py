"""The run folder (`[logging] log_dir`): one writer, append-only records, cut back to the checkpoint on resume."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any

from retrain.training.checkpoint import CHECKPOINTS, TRAINER_STATE
from retrain.training.records import numbered
from retrain.types import ConfigError, RetrainError

CONFIG = "config.toml"
METADATA = "metadata.json"
METRICS = "metrics.jsonl"
GENERATIONS = "generations.jsonl"
FINAL = "final"
LOCK = ".lock"
BEGINNING = ".beginning"


def holds_run(log_dir: Path) -> bool:
    """Whether a run was started here: its folder is never written over.

    A beginning that was cut short is no run: it has not one step, and the next one clears it.
    """
    begun = any((log_dir / name).exists() for name in (CONFIG, METRICS, METADATA, CHECKPOINTS))
    return begun and not (log_dir / BEGINNING).exists()


def owner(log_dir: Path) -> int | None:
    """Process id of the run that is writing to this folder (0 while it is only starting), None where there is none."""
    try:
        with (log_dir / LOCK).open() as file:
            if _lock(file, fcntl.LOCK_SH):
                return None
            return int(file.read() or 0)
    except FileNotFoundError:
        return None


class RunFolder:
    """Opens `log_dir` for writing, alone. Raises ConfigError while another process has it, or where it is not writable.

    The kernel drops the lock with the process, however it dies: a stale lock cannot exist.
    """

    def __init__(self, log_dir: Path) -> None:
        self.path = log_dir
        self._streams: dict[str, FileIO] = {}
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            self._lock = (log_dir / LOCK).open("ab", buffering=0)
            if not _lock(self._lock, fcntl.LOCK_EX, attempts=20):
                self._lock.close()
                raise ConfigError(f"{log_dir} is in use by process {owner(log_dir)}; give another --log-dir")
            self._lock.truncate(0)
            self._lock.write(str(os.getpid()).encode())
        except OSError as error:
            raise ConfigError(
                f"logging.log_dir = {log_dir}: cannot be written to: {error.strerror}. Give another --log-dir"
            ) from None

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Around the first writes of a run, which mean nothing before all of them are there."""
        marker = self.path / BEGINNING
        if marker.exists():
            for name in (CONFIG, METADATA, METRICS, GENERATIONS, TRAINER_STATE):
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)
        marker.touch()
        yield
        marker.unlink()

    def append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows to `name`, a line each. Numbers are finite or null.

        Raises ValueError, with no row written, for anything else, which would be a bug.
        Raises OSError when the disk is full; the file may then end in half a line, which a resume cuts off.
        """
        text = "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
        if name not in self._streams:
            # Unbuffered: what could not be written must not be tried again when the file is closed.
            self._streams[name] = (self.path / name).open("ab", buffering=0)
        # A lone surrogate becomes its JSON escape: "\ud800".
        left = memoryview(text.encode("utf-8", "backslashreplace"))
        while left:
            left = left[self._streams[name].write(left) :]

    def sync(self) -> None:
        for stream in self._streams.values():
            os.fsync(stream.fileno())

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._lock.close()


def copy_records(source: Path, target: Path, *, up_to: int) -> None:
    """Copy metrics and generations of steps <= `up_to`; with source == target, cut what lies past the checkpoint.

    Raises RetrainError, before anything is written, for a line of those steps that is damaged.
    """
    ends = {name: _end_of_step(source / name, up_to) for name in (METRICS, GENERATIONS) if (source / name).exists()}
    for name, end in ends.items():
        if source.resolve() != target.resolve():
            shutil.copyfile(source / name, target / name)
        os.truncate(target / name, end)


def _end_of_step(path: Path, last: int) -> int:
    """Bytes of the lines that belong to steps <= `last`."""
    end = step = 0
    try:
        for position, row in numbered(path):
            if row["step"] > last:
                break
            end, step = position, row["step"]
    except RetrainError:
        # Lines past the checkpoint were never synced: a crash may have left anything there, and it is cut off.
        if step < last:
            raise
    return end


def _lock(file: IO[Any], kind: int, attempts: int = 1) -> bool:
    """Try to lock an open file; whether it worked. Closing the file unlocks it.

    attempts: 10 ms apart. `owner`, asked by another process, holds a lock for a moment, and that is not a run.
    """
    for attempt in range(attempts):
        if attempt:
            time.sleep(0.01)
        with suppress(BlockingIOError):
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
    return False
