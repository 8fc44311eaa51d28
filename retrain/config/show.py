"""Values as a user would write them."""

from __future__ import annotations

import json
from typing import Any

LONGEST = 80


def show(value: Any) -> str:
    """A value in TOML spelling on one line, cut when long."""
    match value:
        case float() | int() if not isinstance(value, bool):
            text = repr(value)
        case _:
            text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def show_key(path: str, value: Any) -> str:
    """`section.key = value`."""
    return f"{path} = {show(value)}"
