"""Commands as processes of this machine, none of which outlives this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from retrain.plugin import child_environment

# The command line of `python -m retrain`, bound to the life of whoever holds the other end of its stdin.
WORKER = (sys.executable, "-m", "retrain.cli.worker")


class Process:
    """One command, in a session of its own: Ctrl-C is the campaign's, which then asks its runs to stop."""

    def __init__(
        self,
        arguments: Sequence[str],
        stdout: Path,
        stderr: Path,
        environment: dict[str, str] | None = None,
        cwd: str | None = None,
    ) -> None:
        with stdout.open("ab") as out, stderr.open("ab") as err:
            self._process = subprocess.Popen(
                [*WORKER, *arguments],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                env=child_environment() | {"PYTHONUNBUFFERED": "1"} | (environment or {}),
                cwd=cwd,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        status = self._process.poll()
        if status is not None and self._process.stdin is not None:
            self._process.stdin.close()
        return status

    def stop(self) -> None:
        """Ask it to end after a checkpoint."""
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.poll()


class LocalExecutor:
    """threads: of each process on a CPU, 0 = as it likes."""

    def __init__(self, devices: tuple[str, ...], threads: int = 0) -> None:
        self.devices = devices
        self._environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}

    def start(self, arguments: Sequence[str], stdout: Path, stderr: Path) -> Process:
        return Process(arguments, stdout, stderr, self._environment)

    def close(self) -> None:
        """Nothing is left to close: each process was waited for, or killed, by whoever started it."""
