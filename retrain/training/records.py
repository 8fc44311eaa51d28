"""Reading a run's records (JSONL), whole or from the end. Torch-free.

A line counts once its line break is written: what follows the last one is being written, or was cut short by a crash.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retrain.types import RetrainError

_CHUNK = 65536


def last_row(path: Path) -> dict[str, Any] | None:
    """The last complete line, found from the end of the file; None for a missing or empty file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        size, chunk = file.seek(0, 2), _CHUNK
        while True:
            start = max(0, size - chunk)
            file.seek(start)
            # Without the unfinished line at the end and, unless this is the whole file, the first, which is cut.
            lines = file.read(size - start).split(b"\n")[0 if start == 0 else 1 : -1]
            if lines:
                return _parse(lines[-1], f"{path}: its last line")
            if start == 0:
                return None
            chunk *= 2


def last_rows(path: Path, within: int) -> list[dict[str, Any]]:
    """The complete lines that lie wholly within the last `within` bytes; none for a missing file."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        start = max(0, file.seek(0, 2) - within)
        file.seek(start)
        lines = file.read().split(b"\n")[0 if start == 0 else 1 : -1]
    return [_parse(line, f"{path}: one of its last lines") for line in lines]


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines in their order; none for a missing file."""
    return (row for _, row in numbered(path))


def numbered(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(bytes up to and including the line, line) of every complete line. Raises RetrainError at one that is damaged."""
    if not path.is_file():
        return
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                end += len(line)
                yield end, _parse(line, f"{path}:{number}")


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise RetrainError(f"{place} is not a record of a step: the file is damaged. Repair or remove that line")
    return row
