"""Many episodes at once against one engine that samples in batches.

Episodes are coroutines on an event loop of their own thread. Each asks for a turn and waits; when all that still run
are waiting, their requests go to the engine together, from the thread that called `play`. The batches of a step
therefore depend on the episodes alone, not on how fast each of them is.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retrain.loops import start_loop
from retrain.types import Completion

POLL_S = 1.0
CLOSE_S = 5.0


@dataclass(frozen=True)
class Turn:
    """A request for one completion. context_T: int64 token ids. stream: random stream. max_tokens: at least 1."""

    context_T: np.ndarray
    stream: int
    max_tokens: int


Take = Callable[[Turn], Awaitable[Completion]]
Episode = Callable[[Take], Awaitable[Any]]
Sample = Callable[[Sequence[Turn]], Sequence[Completion]]


class EpisodeFailed(Exception):
    """An episode ended without a result: the reason."""


class Waves:
    """timeout_s: seconds that an episode may take from one turn to the next, the model's time not counted."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._begin()

    def _begin(self) -> None:
        self.loop, self._thread = start_loop("retrain-episodes")

    def play(self, episodes: Sequence[Episode], sample: Sample) -> list[Any]:
        """What each episode returned, or an EpisodeFailed in its place.

        An episode that raises, or waits too long for something, ends alone. One that blocks the thread (a synchronous
        call that does not return) takes with it those that have not ended, and their thread is left behind.
        What `sample` raises is raised, and ends all episodes.
        """
        round_ = _Round(self.loop, self.timeout_s, len(episodes))
        future = asyncio.run_coroutine_threadsafe(round_.run(episodes), self.loop)
        try:
            while (wave := self._next(round_)) is not None:
                answers = sample([turn for _, turn, _ in wave])
                self.loop.call_soon_threadsafe(_deliver, wave, answers)
        except _Blocked as blocked:
            self._end()
            self._begin()
            failure = EpisodeFailed(f"the environment did not return within {self.timeout_s:g} s from {blocked}")
            return [failure if result is _RUNNING else result for result in round_.results]
        except BaseException:
            future.cancel()
            raise
        future.result()
        return round_.results

    def call(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """Run one coroutine on the episodes' loop. Raises TimeoutError after `timeout_s`."""

        async def limited() -> Any:
            async with asyncio.timeout(self.timeout_s):
                return await work()

        return asyncio.run_coroutine_threadsafe(limited(), self.loop).result()

    def close(self) -> None:
        self._end()
        self._thread.join(CLOSE_S)

    def _end(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)

    def _next(self, round_: _Round) -> list[_Request] | None:
        """The next wave, None when all have ended. Raises _Blocked when the loop has not moved for too long."""
        silent = 0.0
        while True:
            try:
                return round_.waves.get(timeout=POLL_S)
            except queue.Empty:
                moved = threading.Event()
                self.loop.call_soon_threadsafe(moved.set)
                silent = 0.0 if moved.wait(POLL_S) else silent + 2 * POLL_S
                if silent > self.timeout_s:
                    raise _Blocked(self._where()) from None

    def _where(self) -> str:
        frame = sys._current_frames().get(self._thread.ident or 0)
        if frame is None:
            return "an unknown place"
        place = traceback.extract_stack(frame)[-1]
        return f"{place.filename}:{place.lineno} ({place.name})"


class _Blocked(Exception):
    """The loop's thread does not come back: where it is."""


_Request = tuple[int, Turn, "asyncio.Future[Completion]"]
_RUNNING: Any = object()


class _Round:
    """The episodes of one `play`. Everything but `waves.get` happens on the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout_s: float, count: int) -> None:
        self.loop, self.timeout_s = loop, timeout_s
        self.waves: queue.SimpleQueue[list[_Request] | None] = queue.SimpleQueue()
        self.results: list[Any] = [_RUNNING] * count
        self.waiting: list[_Request] = []
        self.running = count

    async def run(self, episodes: Sequence[Episode]) -> None:
        try:
            await asyncio.gather(*(self._run_one(index, episode) for index, episode in enumerate(episodes)))
        finally:
            self.waves.put(None)

    async def _run_one(self, index: int, episode: Episode) -> None:
        try:
            async with asyncio.timeout(self.timeout_s) as limit:

                async def take(turn: Turn) -> Completion:
                    limit.reschedule(None)
                    answer = await self._take(index, turn)
                    limit.reschedule(self.loop.time() + self.timeout_s)
                    return answer

                self.results[index] = await episode(take)
        except Exception as error:  # noqa: BLE001 - foreign code, which may fail in any way
            timed_out = isinstance(error, TimeoutError)
            reason = f"no turn within {self.timeout_s:g} s" if timed_out else f"{type(error).__name__}: {error}"
            self.results[index] = error if isinstance(error, EpisodeFailed) else EpisodeFailed(reason)
        finally:
            self.running -= 1
            self._send_if_complete()

    async def _take(self, index: int, turn: Turn) -> Completion:
        request = (index, turn, self.loop.create_future())
        self.waiting.append(request)
        self._send_if_complete()
        try:
            return await request[2]
        finally:
            if request in self.waiting:
                self.waiting.remove(request)

    def _send_if_complete(self) -> None:
        if self.waiting and len(self.waiting) == self.running:
            wave, self.waiting = sorted(self.waiting, key=lambda request: request[0]), []
            self.waves.put(wave)


def _deliver(wave: Sequence[_Request], answers: Sequence[Completion]) -> None:
    for (_, _, future), answer in zip(wave, answers, strict=True):
        if not future.done():
            future.set_result(answer)
