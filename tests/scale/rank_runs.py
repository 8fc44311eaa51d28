"""Runs of several ranks in the tests: the real command in forks, with the variables that torchrun sets."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from runs import environment, fork


@dataclass
class RanksRun:
    """A run under way. pids: of the ranks, once they have started."""

    folder: Path
    size: int
    pids: dict[int, int] = field(default_factory=dict)
    statuses: list[int] = field(default_factory=list)
    ended: float = 0.0

    def output(self, rank: int, stream: str) -> str:
        return (self.folder / f"{stream}_{rank}").read_text(encoding="utf-8")

    @property
    def said(self) -> str:
        """What all ranks said on stderr."""
        return "".join(self.output(rank, "stderr") for rank in range(self.size))

    def send(self, number: int, *ranks: int) -> None:
        for rank in ranks or range(self.size):
            os.kill(self.pids[rank], number)


def run_ranks(
    folder: Path, size: int, *arguments: object, meanwhile: Callable[[RanksRun], object] | None = None
) -> RanksRun:
    """Run the command to its end as `size` ranks. meanwhile: called in this thread, while it runs."""
    folder.mkdir(parents=True, exist_ok=True)
    run = RanksRun(folder, size)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }

    def one(rank: int) -> int:
        request = {
            "arguments": [str(word) for word in arguments],
            "folder": str(Path.cwd()),
            "environment": environment() | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            **{stream: str(folder / f"{stream}_{rank}") for stream in ("stdout", "stderr")},
        }
        return fork(request, 240, server=rank, started=lambda pid: run.pids.update({rank: pid}))

    with ThreadPoolExecutor(size) as pool:
        waiting = [pool.submit(one, rank) for rank in range(size)]
        if meanwhile is not None:
            meanwhile(run)
        run.statuses = [future.result() for future in waiting]
    run.ended = time.monotonic()
    return run


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, "it did not come to that"
        time.sleep(0.02)
