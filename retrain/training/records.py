"""Reading a run's records without reading all of them. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CHUNK = 65536


def last_row(path: Path) -> dict[str, Any] | None:
    """The last complete line of a JSONL file, read from its end; None for a missing or empty file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        end = file.seek(0, 2)
        tail = b""
        while end > 0:
            start = max(0, end - _CHUNK)
            file.seek(start)
            tail = file.read(end - start) + tail
            end = start
            lines = [line for line in tail.split(b"\n")[(1 if start else 0) :] if line.strip()]
            for line in reversed(lines):
                try:
                    return json.loads(line)
                except ValueError:
                    continue  # the line that is being written, or that a crash cut short
    return None


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSONL file, without one that a crash cut short at its end."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                return
