"""Rows from files: JSONL, JSON, CSV and Parquet, each row with its place."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from retrain.data.records import Row, shown
from retrain.types import ConfigError


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, by its extension.

    .jsonl: one object a line. .json: a list of objects, or an object of which one value is such a list. .csv: columns
    as the header row names them, all values text. .parquet: needs the extra `data`.
    Raises ConfigError, with the line or row, for what cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f'data.source = "{path}": no such file') from None
    except OSError as error:
        raise ConfigError(f'data.source = "{path}": cannot be read: {error.strerror}') from None
    return list(READERS[path.suffix](path, data))


def _jsonl(path: Path, data: bytes) -> Iterator[Row]:
    # Only "\n" ends a line: JSON strings may hold the other separators that str.splitlines() knows (U+2028, U+0085).
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield place, _object(place, _parsed(place, line, "one object a line"), "a line")


def _json(path: Path, data: bytes) -> Iterator[Row]:
    place, content = str(path), None
    if data.strip():
        content = _parsed(place, data.removeprefix(codecs.BOM_UTF8), "a list of objects")
    if isinstance(content, dict):
        lists = [key for key, value in content.items() if isinstance(value, list)]
        if len(lists) != 1:
            found = f"lists at {', '.join(lists)}" if lists else "no list"
            raise ConfigError(f"{path}: an object must hold one list of rows, this one has {found}")
        place, content = f'{path}["{lists[0]}"]', content[lists[0]]
    if content is not None and not isinstance(content, list):
        raise ConfigError(f"{path}: must be a list of objects, this is {shown(content)}")
    for index, row in enumerate(content or []):
        yield f"{place}[{index}]", _object(f"{place}[{index}]", row, "a row")


def _csv(path: Path, data: bytes) -> Iterator[Row]:
    text = _decoded(str(path), data.removeprefix(codecs.BOM_UTF8))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        place = f"{path}:{reader.line_num + 1}"  # a quoted cell may go over several lines: where the row begins
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ConfigError(f"{place}: not CSV: {error}") from None
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = _unique(place, cells)
        elif len(cells) != len(header):
            raise ConfigError(
                f"{place}: {len(cells)} cells, but the header names {len(header)} columns: {', '.join(header)}. "
                'Quote a cell that holds a comma ("a, b")'
            )
        else:
            yield place, dict(zip(header, cells, strict=True))


def _parquet(path: Path, data: bytes) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            f'data.source = "{path}": Parquet needs pyarrow, which is not installed: pip install "retrain[data]"'
        ) from None
    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path}: not Parquet ({error})") from None
    for index, row in enumerate(rows):
        yield f"{path}[{index}]", row


READERS: dict[str, Callable[[Path, bytes], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _decoded(place: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start)
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        where = f"byte {column} of the line" if not line else f"line {line + 1}, byte {column}"
        raise ConfigError(f"{place}: not UTF-8 ({where}); save the file as UTF-8") from None


def _parsed(place: str, data: bytes, wanted: str) -> Any:
    try:
        return json.loads(_decoded(place, data))
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{place}: not JSON ({error.msg} at {where}); write {wanted}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested without end
        raise ConfigError(f"{place}: not usable JSON ({error})") from None


def _object(place: str, row: Any, what: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: {what} must be a JSON object, this is {shown(row)}")
    return row


def _unique(place: str, names: list[str]) -> list[str]:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f'{place}: the header names the column "{name}" twice; rename one')
    return names
