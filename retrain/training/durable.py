"""Writes that survive a crash: a file is either the old one or the whole new one, never half of it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_SEAL = "sha256"


def leftovers(folder: Path) -> list[Path]:
    """What writes that were cut short have left in it; the next write of the same file takes it away."""
    return list(folder.glob(".*.tmp"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write to a temporary name beside `path`, fsync, rename, fsync the folder.

    On OSError (a full disk, say) the old file is as it was and nothing else is left behind.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_sealed_json(path: Path, value: dict[str, Any]) -> None:
    """With the SHA-256 of itself as last key: `read_sealed_json` finds any change."""
    write_json(path, value | {_SEAL: _digest(value)})


def read_sealed_json(path: Path) -> dict[str, Any]:
    """What `write_sealed_json` wrote. Raises OSError, and ValueError where it is not that."""
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict) or value.pop(_SEAL, None) != _digest(value):
        raise ValueError("it does not match its checksum")
    return value


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, allow_nan=False).encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """fsync every file of a flat folder, and the folder."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def seal(folder: Path, **facts: Any) -> None:
    """fsync every file of `folder` and write a manifest of their sizes and SHA-256 digests, `facts` beside them.

    The folder is flat. Sealing comes last: a folder without a manifest was not written to its end.
    """
    files = {}
    for path in sorted(p for p in folder.iterdir() if p.name != MANIFEST):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            files[path.name] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    write_sealed_json(folder / MANIFEST, facts | {"files": files})


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, or None: a missing manifest, a missing, truncated or altered file."""
    try:
        files = read_sealed_json(folder / MANIFEST)["files"]
        expected = {name: (facts["bytes"], facts["sha256"]) for name, facts in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is unreadable or altered"
    return next(filter(None, (_file_damage(folder / name, *facts) for name, facts in expected.items())), None)


def _file_damage(path: Path, size: int, digest: str) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != size:
        return f"{path.name} has {path.stat().st_size} of {size} bytes"
    try:
        with path.open("rb") as file:
            intact = hashlib.file_digest(file, "sha256").hexdigest() == digest
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None if intact else f"{path.name} does not match its checksum"
