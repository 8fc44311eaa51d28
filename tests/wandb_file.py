"""Reads what wandb wrote offline: records (protobuf) in LevelDB's log format behind a header of seven bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    data = path.read_bytes()
    assert data[:4] == b":W&B", data[:7]
    position, whole = 7, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        part = data[position + 7 : position + 7 + size]
        position += 7 + size
        whole = part if kind in (FULL, FIRST) else whole + part
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record


def history(path: Path) -> list[dict[str, Any]]:
    """The logged rows, `_step` among their keys."""
    rows = []
    for record in records(path):
        if record.HasField("history"):
            items = record.history.item
            row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
            rows.append(row)
    return rows


def run_record(path: Path) -> Any:
    return next(record.run for record in records(path) if record.HasField("run"))
