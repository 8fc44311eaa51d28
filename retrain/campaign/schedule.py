"""The jobs of a campaign, as many at a time as there is room: started, watched, and stopped together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

POLL_SECONDS = 0.2


class Started(Protocol):
    """A job under way."""

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        ...

    def stop(self) -> None:
        """Ask it to end soon; a run writes a checkpoint first."""
        ...

    def kill(self) -> None:
        """End it now, and wait until it has ended."""
        ...


class Executor(Protocol):
    """Where jobs run. devices: one for each that can run at a time."""

    devices: tuple[str, ...]

    def start(self, arguments: Sequence[str], stdout: Path, stderr: Path) -> Started: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Job:
    """arguments: makes the command line, given the device. stdout, stderr: files that are appended to."""

    name: str
    arguments: Callable[[str], Sequence[str]]
    stdout: Path
    stderr: Path


class Watcher(Protocol):
    """Told what happens to the jobs."""

    def began(self, job: Job) -> None: ...

    def ended(self, job: Job, status: int) -> Iterable[Job]:
        """Returns the jobs that follow from this one; they come next."""
        ...

    def tick(self) -> None:
        """Now and then, while jobs run."""
        ...


def run_jobs(
    jobs: Iterable[Job],
    executor: Executor,
    watcher: Watcher,
    *,
    stagger_seconds: float = 0.0,
    interrupted: Callable[[], bool] = lambda: False,
) -> None:
    """Run all `jobs`. Once `interrupted` says so, nothing more is started, and those under way are asked to stop.

    Whatever is raised, no job is left running.
    """
    waiting, free = deque(jobs), deque(executor.devices)
    running: dict[Job, tuple[Started, str]] = {}
    next_start, stopping = 0.0, False
    try:
        while waiting or running:
            for job, (started, device) in list(running.items()):
                status = started.poll()
                if status is not None:
                    del running[job]
                    free.append(device)
                    waiting.extendleft(watcher.ended(job, status))
            if interrupted() and not stopping:
                stopping = True
                for started, _ in running.values():
                    started.stop()
            if stopping:
                waiting.clear()
            while waiting and free and time.monotonic() >= next_start:
                job, device = waiting.popleft(), free.popleft()
                running[job] = executor.start(job.arguments(device), job.stdout, job.stderr), device
                next_start = time.monotonic() + stagger_seconds
                watcher.began(job)
            watcher.tick()
            time.sleep(POLL_SECONDS if running or waiting else 0)
    finally:
        for started, _ in running.values():
            started.kill()
