"""The folder that servers load adapters from: one sub-folder per policy version, written whole, old ones removed."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from retrain.inference.dialects import Adapter
from retrain.types import ConfigError, RetrainError


class AdapterStore:
    """Publishes below `root`/<tag>, where the tag is this run's alone: two runs may share `root` and a server."""

    def __init__(self, root: str) -> None:
        """Raises ConfigError where the folder cannot be made."""
        self.tag = secrets.token_hex(4)
        # Absolute: the server has another working directory.
        self.folder = Path(root).expanduser().absolute() / self.tag
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"backend.adapter_path = {root}: cannot be written to: {error.strerror}") from error

    def write(self, version: int, save: Callable[[Path], None]) -> Adapter:
        """A new version, complete before it has its name. Raises RetrainError where it cannot be written."""
        folder = self.folder / f"v{version}"
        unfinished = self.folder / f".v{version}.unfinished"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            save(unfinished)
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
        except OSError as error:
            raise RetrainError(f"backend.adapter_path: {folder} cannot be written: {error.strerror}") from error
        return Adapter(f"retrain-{self.tag}-v{version}", folder, version)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
