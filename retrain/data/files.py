"""Examples from files."""

from __future__ import annotations

import codecs
import json
import math
from pathlib import Path
from typing import Any

from retrain.types import ConfigError, Example


def read_jsonl(path: Path, *, prompt_field: str, reference_field: str) -> list[Example]:
    """One JSON object per line; numbers are accepted as references and read as text. Blank lines are passed over.

    Raises ConfigError with the line for anything else: a missing field (naming those that exist), bad JSON, bad UTF-8.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f'data.source = "{path}": no such file') from None
    except OSError as error:
        raise ConfigError(f'data.source = "{path}": cannot be read: {error.strerror}') from None
    # Only "\n" ends a line: JSON strings may hold the other separators that str.splitlines() knows (U+2028, U+0085).
    lines = enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1)
    return [_example(f"{path}:{number}", line, prompt_field, reference_field) for number, line in lines if line.strip()]


def _example(place: str, line: bytes, prompt_field: str, reference_field: str) -> Example:
    row = _object(place, line)
    for key, name in ((prompt_field, "prompt_field"), (reference_field, "reference_field")):
        if key not in row:
            has = ", ".join(row) or "no field at all"
            raise ConfigError(f'{place}: no field "{key}"; it has {has}. Set data.{name} to the one to use')
    prompt, reference = row[prompt_field], row[reference_field]
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError(f'{place}: "{prompt_field}" must be a non-empty string, not {_shown(prompt)}')
    if not _is_reference(reference):
        raise ConfigError(
            f'{place}: "{reference_field}" must be a non-empty string or a number, not {_shown(reference)}'
        )
    try:
        return Example(prompt, str(reference))
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None


def _object(place: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place}: not JSON ({error.msg} at column {error.colno}); write one object a line") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested without end
        raise ConfigError(f"{place}: not usable JSON ({error})") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: a line must be a JSON object, this is {_shown(row)}")
    return row


def _is_reference(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    """A JSON value as its file has it, shortened."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
