"""Secrets of the environment (and so of `.env`, which is read into it), kept out of what a run says and writes.

Taken for a secret: the value of a variable whose name ends in KEY, TOKEN, SECRET, PASSWORD or the like, and user and
password of an address in any variable, as a proxy's. Not below MIN_LENGTH characters: "EMPTY", for a server that wants
any key, would be found everywhere. Nor the path of a file that holds a key.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import quote

T = TypeVar("T")

MIN_LENGTH = 8
SHOWN = "***"
_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL)S?(_?\d+)?$", re.IGNORECASE)
_USER = re.compile(r"://([^/\s@]+)@")


def secrets_of(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The secrets of `environ` (None: the process's), each with the name of a variable that holds it.

    Longer ones first: one may be part of another.
    """
    found: dict[str, str] = {}
    for name, value in (os.environ if environ is None else environ).items():
        whole = [value.strip()] if _NAME.search(name) and not _is_path(value) else []
        users = _USER.findall(value)
        passwords = [user.partition(":")[2] for user in users]
        found |= {secret: name for secret in (*whole, *users, *passwords) if len(secret) >= MIN_LENGTH}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def redact(value: T, environ: Mapping[str, str] | None = None) -> T:
    """`value` with every secret of `environ` shown as ***, also where it is escaped as in JSON, Python or an address.

    value: a string, or JSON's lists and tables, whose strings are looked at.
    """
    forms = [form for secret in secrets_of(environ) for form in _forms(secret)]
    return _without(forms, value) if forms else value


def _without(forms: list[str], value: Any) -> Any:
    match value:
        case str():
            for form in forms:
                value = value.replace(form, SHOWN)
            return value
        case dict():
            return {name: _without(forms, inner) for name, inner in value.items()}
        case list() | tuple():
            return [_without(forms, inner) for inner in value]
    return value


def shown(text: str) -> str:
    """`text` as a terminal may show it: without secrets, and without control codes, which could do anything to it.
    Models, servers and datasets write such texts."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else " " for letter in redact(text))


def _is_path(value: str) -> bool:
    return value.startswith("/") and os.path.exists(value)  # noqa: PTH110 - a Path raises where a name is too long


def _forms(secret: str) -> set[str]:
    escaped = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]}
    return {secret, *escaped, quote(secret, safe="")}
