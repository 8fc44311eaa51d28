"""metadata.json: what ran, where, on what, from when to when."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from retrain.redact import redact
from retrain.training import durable
from retrain.training.folder import METADATA
from retrain.types import ConfigError

PACKAGES = ("retrain", "torch", "transformers", "peft", "safetensors", "numpy", "math-verify", "triton")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def git_commit() -> str | None:
    """Commit of the checkout that retrain runs from, "-dirty" where it differs; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def read_metadata(log_dir: Path) -> dict[str, Any]:
    """What an earlier session wrote; {} where there is no such file. Raises ConfigError where it cannot be read."""
    path = log_dir / METADATA
    try:
        return durable.read_sealed_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        aside = shlex.join(["mv", str(path), f"{path}.damaged"])
        raise ConfigError(f"{path} is damaged ({error}). Move it away to go on without it: {aside}") from None


class Metadata:
    """The file's content; a resumed run adds a session to those that are there."""

    def __init__(self, log_dir: Path, facts: dict[str, Any], *, from_step: int, resumed: dict[str, Any] | None) -> None:
        self.path = log_dir / METADATA
        earlier = read_metadata(log_dir)
        session: dict[str, Any] = {
            "command": redact(sys.argv),
            "pid": os.getpid(),
            "start": now(),
            "end": None,
            "from_step": from_step,
            "to_step": None,
            "status": "running",
            "resumed": resumed,
        }
        self.session = session
        self.content = {
            **facts,
            "git_commit": git_commit(),
            "versions": versions(),
            "hardware": hardware(),
            "start": earlier.get("start", session["start"]),
            "end": None,
            "sessions": [*earlier.get("sessions", []), session],
        }
        self.write()

    def close(self, *, step: int, status: str) -> None:
        """status: finished, interrupted or failed."""
        self.session.update(end=now(), to_step=step, status=status)
        self.content["end"] = self.session["end"]
        self.write()

    def write(self) -> None:
        durable.write_sealed_json(self.path, self.content)
