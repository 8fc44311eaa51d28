"""`.env` of the working directory: API keys and the like, without a dependency."""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from pathlib import Path

LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)")
ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}


def load_dotenv(environ: MutableMapping[str, str], path: Path = Path(".env")) -> list[str]:
    """Set the variables of `path` that `environ` does not have. Returns one warning for each line it could not read.

    Values may stand in single quotes (taken as they are) or double quotes (with \\n, \\t, \\", \\\\); a comment starts
    with # at the start of a line or after a space. Warnings name lines, never their content, which may be secret.
    """
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        return [f"{path}: not loaded: {type(exc).__name__}"]
    warnings = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        value = _value(match[2]) if match else None
        if match is None or value is None or "\0" in value:
            warnings.append(f"{path}:{number}: skipped; write NAME=value")
        else:
            environ.setdefault(match[1], value)
    return warnings


def _value(text: str) -> str | None:
    """The value of an assignment's right side; None when its quotes do not close."""
    if text[:1] not in ("'", '"'):
        return re.split(r"(?:^|\s)#", text, maxsplit=1)[0].rstrip()
    pattern = r"'([^']*)'" if text[0] == "'" else r'"((?:[^"\\]|\\.)*)"'
    match = re.fullmatch(pattern + r"\s*(?:#.*)?", text)
    if match is None:
        return None
    if text[0] == "'":
        return match[1]
    return re.sub(r"\\(.)", lambda escape: ESCAPES.get(escape[1], escape[1]), match[1])
