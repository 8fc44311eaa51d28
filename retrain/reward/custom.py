"""The `custom` reward: a function of the user's own, `score(response, reference) -> float`, sync or async.

Python cannot stop a thread. So foreign code runs in daemon threads only, which nothing ever waits for: a call that is
over time is an error at once, its thread is left behind (and ends with the process), and the next call has a new one.
A sync function has a thread for each call, an async one an event loop in a thread of its own; the loop is left behind
as well when the function blocks it.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from retrain.loops import start_loop
from retrain.plugin import load_callable
from retrain.types import RetrainError, Score

if TYPE_CHECKING:
    from retrain.config.rewards import RewardKeys

THREADS = 8  # calls of a sync function at a time: more only take the time of each other
TASKS = 64  # calls of an async function at a time
LOOP_GRACE_S = 1.0  # the loop cancels a call that is over time; if it has not by then, it is blocked
MOST_ABANDONED = 256
LONGEST_REASON = 300


class CustomScorer:
    """Calls `[reward] custom_function` of `custom_module`, many calls at a time.

    An exception, a call that takes more than `timeout_s`, and a result that is no finite number are errors with their
    reason, never zeros. abandoned: threads left behind so far, each in a call that did not end.
    Raises ConfigError where the function cannot be loaded or called with (response, reference).
    """

    def __init__(self, keys: RewardKeys) -> None:
        self._name = f"{keys.custom_module}.{keys.custom_function}"
        function = load_callable(
            self._name, what="reward.custom_module + custom_function", parameters=("response", "reference")
        )
        self._timeout_s = keys.timeout_s
        self._caller: _Caller = _Loop(function, keys.timeout_s) if _is_async(function) else _Threads(function)
        self.abandoned = 0

    def score(
        self, responses: Sequence[str], references: Sequence[str], prompts: Sequence[str] | None = None
    ) -> list[Score]:
        """One score a response. Raises RetrainError once MOST_ABANDONED calls did not end."""
        waiting = list(enumerate(zip(responses, references, strict=True)))[::-1]
        scores: dict[int, Score] = {}
        running: dict[Future[Any], tuple[int, float]] = {}
        while waiting or running:
            while waiting and len(running) < self._caller.at_once:
                place, pair = waiting.pop()
                limit_s = self._timeout_s + self._caller.grace_s
                running[self._caller.start(*pair)] = (place, time.monotonic() + limit_s)
            first_end = min(end for _, end in running.values())
            done, _ = wait(running, max(0.0, first_end - time.monotonic()), FIRST_COMPLETED)
            for future in done:
                scores[running.pop(future)[0]] = self._read(future)
            late = {future for future, (_, end) in running.items() if end <= time.monotonic() and not future.done()}
            if late:
                lost, threads = self._caller.abandon(late, set(running))
                for future in lost:
                    scores[running.pop(future)[0]] = Score(None, f"{self._late}{self._caller.late_hint}")
                self._abandon(threads)
        return [scores[place] for place in range(len(responses))]

    def figures(self) -> dict[str, float | None]:
        """custom_threads_abandoned: how many threads were left behind so far."""
        return {"custom_threads_abandoned": self.abandoned}

    def close(self) -> None:
        self._caller.close()

    def _read(self, future: Future[Any]) -> Score:
        if future.cancelled():
            return Score(None, f"{self._name} was cancelled")
        error = future.exception()
        if isinstance(error, _TookTooLong):
            return Score(None, self._late)
        if error is not None:
            return Score(None, f"{self._name} raised {type(error).__name__}: {error}"[:LONGEST_REASON])
        return _checked(future.result(), self._name)

    @property
    def _late(self) -> str:
        return f"{self._name} took longer than {self._timeout_s:g} s"

    def _abandon(self, threads: int) -> None:
        self.abandoned += threads
        if self.abandoned > MOST_ABANDONED:
            raise RetrainError(
                f"{self._name}: {self.abandoned} calls did not end within reward.timeout_s = {self._timeout_s:g} and "
                "still hold their threads; give what it waits for a time limit of its own"
            )


def _checked(value: Any, name: str) -> Score:
    if not isinstance(value, numbers.Real | np.bool_):
        hint = "; write it as `async def`" if inspect.isawaitable(value) else ""
        return Score(None, f"{name} returned {type(value).__name__}, not a number{hint}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    return Score(number) if math.isfinite(number) else Score(None, f"{name} returned {number}, which is not finite")


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class _TookTooLong(Exception):
    pass


class _Caller(Protocol):
    """Starts calls of a function in threads that may be left behind."""

    at_once: int
    grace_s: float
    late_hint: str

    def start(self, response: str, reference: str) -> Future[Any]: ...

    def abandon(self, late: set[Future[Any]], running: set[Future[Any]]) -> tuple[set[Future[Any]], int]:
        """Give the late calls up. Returns them, with those that are lost with them, and the threads left behind."""
        ...

    def close(self) -> None: ...


class _Threads:
    at_once, grace_s, late_hint = THREADS, 0.0, ""

    def __init__(self, function: Callable[[str, str], Any]) -> None:
        self._function = function

    def start(self, response: str, reference: str) -> Future[Any]:
        future: Future[Any] = Future()

        def call() -> None:
            try:
                result = self._function(response, reference)
            except BaseException as error:  # noqa: BLE001 - foreign code; even its sys.exit() is one reward's error
                future.set_exception(error)
            else:
                future.set_result(result)

        threading.Thread(target=call, name="custom-reward", daemon=True).start()
        return future

    def abandon(self, late: set[Future[Any]], running: set[Future[Any]]) -> tuple[set[Future[Any]], int]:
        return late, len(late)

    def close(self) -> None:
        """Nothing is held."""


class _Loop:
    """An event loop in a daemon thread: the same from step to step, as clients that the function keeps need it."""

    at_once, grace_s = TASKS, LOOP_GRACE_S
    late_hint = ", or was waiting with others for one that blocks the event loop (it waits without `await`)"

    def __init__(self, function: Callable[[str, str], Coroutine[Any, Any, Any]], timeout_s: float) -> None:
        self._function, self._timeout_s = function, timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self, response: str, reference: str) -> Future[Any]:
        if self._loop is None:
            self._loop, self._thread = start_loop("custom-reward")
        return asyncio.run_coroutine_threadsafe(self._call(response, reference), self._loop)

    async def _call(self, response: str, reference: str) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                return await self._function(response, reference)
        except TimeoutError:
            if limit.expired():
                raise _TookTooLong from None
            raise  # the function's own
        except (SystemExit, KeyboardInterrupt) as error:  # these would end the loop
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    def abandon(self, late: set[Future[Any]], running: set[Future[Any]]) -> tuple[set[Future[Any]], int]:
        """The loop is blocked, or it would have ended them: it stops when it can, and the next call has another."""
        loop, self._loop = self._loop, None
        assert loop is not None
        loop.call_soon_threadsafe(loop.stop)
        return running, 1

    def close(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None:
            with suppress(RuntimeError):  # it has closed
                loop.call_soon_threadsafe(loop.stop)
            self._thread.join(LOOP_GRACE_S)
