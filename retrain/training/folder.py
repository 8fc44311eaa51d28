"""The run folder (`[logging] log_dir`): one writer, append-only records, cut back to the checkpoint on resume."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from retrain.types import ConfigError

CONFIG = "config.toml"
METADATA = "metadata.json"
METRICS = "metrics.jsonl"
GENERATIONS = "generations.jsonl"
FINAL = "final"
LOCK = ".lock"


def holds_run(log_dir: Path) -> bool:
    """Whether a run was started here: its folder is never written over."""
    return any((log_dir / name).exists() for name in (CONFIG, METRICS, METADATA))


def owner(log_dir: Path) -> int | None:
    """Process id of the run that is writing to this folder, None where there is none."""
    try:
        with (log_dir / LOCK).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0)
    except FileNotFoundError:
        pass
    return None


class RunFolder:
    """Opens `log_dir` for writing, alone. Raises ConfigError while another process has it."""

    def __init__(self, log_dir: Path) -> None:
        self.path = log_dir
        log_dir.mkdir(parents=True, exist_ok=True)
        # The kernel drops this lock with the process, however it dies: a stale lock cannot exist.
        self._lock = (log_dir / LOCK).open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ConfigError(f"{log_dir} is in use by process {owner(log_dir)}; give another --log-dir") from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        self._streams: dict[str, IO[str]] = {}

    def append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows to `name`, a line each; numbers are finite or null, anything else is a bug and raises ValueError."""
        if name not in self._streams:
            self._streams[name] = (self.path / name).open("a", encoding="utf-8")
        stream = self._streams[name]
        stream.writelines(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
        stream.flush()

    def sync(self) -> None:
        for stream in self._streams.values():
            os.fsync(stream.fileno())

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._lock.close()


def copy_records(source: Path, target: Path, *, up_to: int) -> None:
    """Copy metrics and generations of steps <= `up_to`; with source == target, cut what lies past the checkpoint."""
    for name in (METRICS, GENERATIONS):
        path = source / name
        if not path.exists():
            continue
        end = _end_of_step(path, up_to)
        if source != target:
            shutil.copyfile(path, target / name)
        os.truncate(target / name, end)


def _end_of_step(path: Path, last: int) -> int:
    """Bytes of the lines that belong to steps <= `last`; a line that a crash cut short ends them."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            try:
                step = json.loads(line)["step"]
            except ValueError:
                break
            if step > last:
                break
            end += len(line)
    return end
