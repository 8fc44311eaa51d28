"""Examples from files."""

from __future__ import annotations

import json
from pathlib import Path

from retrain.types import ConfigError, Example


def read_jsonl(path: Path, *, prompt_field: str, reference_field: str) -> list[Example]:
    """One JSON object per line; numbers are accepted as references and read as text.

    Raises ConfigError with the line for anything else: a missing field (naming those that exist), bad JSON, bad UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ConfigError(f'data.source = "{path}": no such file') from None
    except UnicodeDecodeError as error:
        raise ConfigError(f'data.source = "{path}": not UTF-8 (byte {error.start}); convert it first') from None
    except OSError as error:
        raise ConfigError(f'data.source = "{path}": {error.strerror}') from None
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    return [_parse(f"{path}:{number}", line, prompt_field, reference_field) for number, line in rows]


def _parse(place: str, line: str, prompt_field: str, reference_field: str) -> Example:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: a line must be a JSON object, this is {type(row).__name__}")
    for key, name in ((prompt_field, "prompt_field"), (reference_field, "reference_field")):
        if key not in row:
            raise ConfigError(f'{place}: no field "{key}"; it has {", ".join(row)}. Set data.{name}')
    prompt, reference = row[prompt_field], row[reference_field]
    if not isinstance(prompt, str) or not prompt:
        raise ConfigError(f'{place}: "{prompt_field}" must be a non-empty string')
    if isinstance(reference, bool) or not isinstance(reference, str | int | float) or reference == "":
        raise ConfigError(f'{place}: "{reference_field}" must be a non-empty string or a number')
    return Example(prompt, str(reference))
