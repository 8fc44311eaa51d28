"""Threads of their own: event loops for foreign coroutines, and one job after the other. Torch-free.

The threads are daemons: one that a call blocks can be left behind, and ends with the process at the latest.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def start_loop(name: str) -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    """A running loop and its thread, called `name`. `loop.call_soon_threadsafe(loop.stop)` ends both, and all tasks."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=_live, args=(loop,), name=name, daemon=True)
    thread.start()
    return loop, thread


def _live(loop: asyncio.AbstractEventLoop) -> None:
    async def end() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.run_until_complete(end())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


class Worker:
    """A thread that does one job after the other. A daemon: what it does when the process ends is given up."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        found: Future[T] = Future()

        def run() -> None:
            try:
                found.set_result(job())
            except BaseException as error:  # noqa: BLE001 - raised again where the result is wanted
                found.set_exception(error)

        self._jobs.put(run)
        return found

    def close(self, patience_s: float) -> None:
        """No further job; wait for the one under way, `patience_s` at most."""
        self._jobs.put(None)
        self._thread.join(patience_s)

    def _live(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
