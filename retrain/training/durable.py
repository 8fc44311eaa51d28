"""Writes that survive a crash: a file is either the old one or the whole new one, never half of it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def write_bytes(path: Path, data: bytes) -> None:
    """Write to a temporary name beside `path`, fsync, rename, fsync the folder."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(folder: Path, **facts: Any) -> None:
    """fsync every file of `folder` and write a manifest of their sizes and SHA-256 digests, `facts` beside them."""
    files = {}
    for path in sorted(p for p in folder.iterdir() if p.name != MANIFEST):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            files[path.name] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    write_json(folder / MANIFEST, facts | {"files": files})


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, or None: a missing manifest, a missing, truncated or altered file."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is unreadable"
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != facts["bytes"]:
            return f"{name} has {size} of {facts['bytes']} bytes"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                return f"{name} does not match its checksum"
    return None
