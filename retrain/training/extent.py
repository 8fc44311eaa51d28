"""How far a file that only grows is vouched for: its first bytes and their checksum, kept up as it grows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrain.types import RetrainError

_CHUNK = 1 << 20


class Extent:
    """The first `size` bytes of a file."""

    def __init__(self) -> None:
        self.size = 0
        self._digest = hashlib.sha256()

    def grow(self, data: bytes | memoryview) -> None:
        self.size += len(data)
        self._digest.update(data)

    @property
    def facts(self) -> dict[str, Any]:
        return {"bytes": self.size, "sha256": self._digest.hexdigest()}


def verify(path: Path, facts: Mapping[str, Any]) -> Extent:
    """The extent that `facts` describe, of a file that may have grown since. A file of no bytes need not exist.

    Raises RetrainError where the file is missing, shorter than that, or was altered.
    """
    extent, left = Extent(), facts["bytes"]
    if left and not path.is_file():
        raise RetrainError(f"{path} is missing")
    if left:
        with path.open("rb") as file:
            while chunk := file.read(min(_CHUNK, left)):
                extent.grow(chunk)
                left -= len(chunk)
    if left:
        raise RetrainError(f"{path} is damaged: it has {extent.size} bytes, and had {facts['bytes']}")
    if extent.facts != facts:
        raise RetrainError(f"{path} is damaged: its first {extent.size} bytes do not match their checksum")
    return extent
