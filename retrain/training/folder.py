"""The run folder (`[logging] log_dir`): one writer, append-only records, cut back to the checkpoint on resume."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any

from retrain.redact import redact
from retrain.training import durable
from retrain.training.checkpoint import CHECKPOINTS, CONFIG, TRAINER_STATE
from retrain.training.extent import Extent, verify
from retrain.types import ConfigError

METADATA = "metadata.json"
METRICS = "metrics.jsonl"
GENERATIONS = "generations.jsonl"
CREDIT = "credit.jsonl"
NONFINITE = "nonfinite.jsonl"
RECORDS = (METRICS, GENERATIONS, CREDIT, NONFINITE)
FINAL = "final"
LOCK = ".lock"
BEGINNING = ".beginning"


def holds_run(log_dir: Path) -> bool:
    """Whether a run was started here: its folder is never written over.

    A beginning that was cut short is no run: it has not one step, and the next one clears it.
    """
    begun = any((log_dir / name).exists() for name in (CONFIG, METADATA, *RECORDS, TRAINER_STATE, CHECKPOINTS))
    return begun and not (log_dir / BEGINNING).exists()


def owner(log_dir: Path) -> int | None:
    """Process id of the run that is writing to this folder (0 while it is only starting), None where there is none."""
    try:
        with (log_dir / LOCK).open() as file:
            if _lock(file, fcntl.LOCK_SH):
                return None
            return int(file.read() or 0)
    except (FileNotFoundError, NotADirectoryError):
        return None


def in_use(log_dir: Path) -> ConfigError:
    return ConfigError(f"{log_dir} is in use by process {owner(log_dir)}; give another --log-dir")


class RunFolder:
    """Opens `log_dir` for writing, alone. Raises ConfigError while another process has it, or where it is not writable.

    The kernel drops the lock with the process, however it dies: a stale lock cannot exist.
    """

    def __init__(self, log_dir: Path) -> None:
        self.path = log_dir
        self._streams: dict[str, FileIO] = {}
        self._extents = {name: Extent() for name in RECORDS}
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            self._lock = (log_dir / LOCK).open("ab", buffering=0)
            if not _lock(self._lock, fcntl.LOCK_EX, attempts=20):
                self._lock.close()
                raise in_use(log_dir)
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
            for name in (CONFIG, METADATA, *RECORDS, TRAINER_STATE):
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
        text = "".join(json.dumps(redact(row), allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
        if name not in self._streams:
            # Unbuffered: what could not be written must not be tried again when the file is closed.
            self._streams[name] = (self.path / name).open("ab", buffering=0)
        # A lone surrogate becomes its JSON escape: "\ud800".
        left = memoryview(text.encode("utf-8", "backslashreplace"))
        while left:
            written = self._streams[name].write(left)
            self._extents.setdefault(name, Extent()).grow(left[:written])
            left = left[written:]

    def sync(self) -> None:
        for stream in self._streams.values():
            os.fsync(stream.fileno())

    def extents(self) -> bytes:
        """JSON: how long each record is, and its checksum; `adopt` goes back to that."""
        return json.dumps({name: extent.facts for name, extent in self._extents.items()}, indent=2).encode()

    def adopt(self, source: Path, extents: Mapping[str, Extent]) -> None:
        """Take over the records of the run in `source`, or cut back one's own, to `extents` of `verify_records`."""
        for name, extent in extents.items():
            path = self.path / name
            if extent.size and source.resolve() != self.path.resolve():
                shutil.copyfile(source / name, path)
            if path.exists():
                with path.open("ab") as file:
                    file.truncate(extent.size)
                    os.fsync(file.fileno())
        durable.sync_folder(self.path)
        self._extents |= extents

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._lock.close()


class FolderOfFirst(RunFolder):
    """The run folder on a rank that is not the first, which alone writes."""

    def __init__(self, log_dir: Path) -> None:
        self.path = log_dir

    def append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        pass


def verify_records(source: Path, facts: Mapping[str, Any]) -> dict[str, Extent]:
    """The extents that a checkpoint recorded (`RunFolder.extents`). Raises RetrainError where a record is damaged."""
    return {name: verify(source / name, each) for name, each in facts.items()}


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
