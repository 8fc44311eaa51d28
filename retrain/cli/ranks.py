"""`retrain --nproc N`: N processes of the same command on this machine, which train one run together.

They are started as torchrun starts them, with the same variables (docs/data-parallel.md). Unlike it, this process knows
how the run ended when a signal ended it, and none of the others outlives it, however it dies.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType

from retrain.campaign.local import WORKER
from retrain.plugin import child_environment
from retrain.types import ConfigError, RetrainError

# They end together; one that has not followed after so long never will.
GRACE_SECONDS = 30.0
POLL_SECONDS = 0.05
HOST = "127.0.0.1"


def take_nproc(text: str | None) -> int:
    """The number of processes that `--nproc` asks for. Raises ConfigError."""
    if text is None:
        return 1
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--nproc {text}: must be a number of processes, from 1 on")
    return int(text)


def run_ranks(argv: Sequence[str], size: int) -> int:
    """Run the command line `argv` as `size` ranks; the run's exit status.

    Raises RetrainError where one of them died before it knew the others.
    """
    ranks = Ranks(argv, size)
    with ExitStack() as opened:
        opened.callback(ranks.kill)
        for number in (signal.SIGINT, signal.SIGTERM):
            opened.callback(signal.signal, number, signal.signal(number, ranks.on_signal))
        return ranks.wait()


class Ranks:
    """The processes. Each is in a session of its own: Ctrl-C comes to this process, which passes it on, once."""

    def __init__(self, argv: Sequence[str], size: int) -> None:
        shared = child_environment() | {
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": HOST,
            "MASTER_PORT": str(_free_port()),
        }
        # As torchrun does: each process would take all cores.
        shared.setdefault("OMP_NUM_THREADS", "1")
        if Path("/sys/class/net/lo").exists():
            # Nobody else has to reach them, nor should.
            shared.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self._asked = False
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._processes.append(
                subprocess.Popen([*WORKER, *argv], stdin=subprocess.PIPE, env=shared | own, start_new_session=True)
            )

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first one asks them to stop after a checkpoint, the second ends them."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL if self._asked else number)
        self._asked = True

    def wait(self) -> int:
        ended: float | None = None
        while any(process.poll() is None for process in self._processes):
            if ended is None and any(process.returncode is not None for process in self._processes):
                ended = time.monotonic()
            if ended is not None and time.monotonic() - ended > GRACE_SECONDS:
                return self._abandon()
            time.sleep(POLL_SECONDS)
        statuses = [process.returncode for process in self._processes]
        if self._asked and all(status < 0 for status in statuses):
            return 128 + signal.SIGINT
        # The first one speaks for all, unless it was killed or did not know.
        told = [status for status in statuses if status > 0]
        return told[0] if told else int(any(statuses))

    def _abandon(self) -> int:
        rank, status = next((r, p.returncode) for r, p in enumerate(self._processes) if p.returncode is not None)
        self.kill()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        raise RetrainError(f"rank {rank} {how} before it knew the others; they were ended. Start the run again")

    def kill(self) -> None:
        """End what is left, and what it has started."""
        for process in self._processes:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.stdin is not None:
                process.stdin.close()


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return server.getsockname()[1]


def without_nproc(argv: Sequence[str]) -> list[str]:
    """The command line of each process."""
    words, rest = [], iter(argv)
    for word in rest:
        if word == "--":
            words += [word, *rest]
        elif word == "--nproc":
            next(rest)
        elif not word.startswith("--nproc="):
            words.append(word)
    return words
