"""One attempt at an HTTP request, what its failure means, and an event loop that a signal leaves clean.

What a failure means for the run (try again, wait for the server, give up) is decided in `session.py`.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from ssl import SSLContext
from typing import Any, TypeVar

import httpx2

from retrain.config.addresses import LOOPBACK_HOSTS
from retrain.redact import redact

T = TypeVar("T")

CONNECT_SECONDS = 10.0
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.25, 10.0
BUSY = {408, 425, 429}
LONGEST_EXCERPT = 300

# Of its own: how often a server failed must not move the random numbers of the run.
_jitter = random.Random()


@dataclass(frozen=True)
class Call:
    """One request: a GET where there is no body, else a POST of it as JSON. json: whether the answer is JSON, too."""

    path: str
    body: dict[str, Any] | None = None
    json: bool = True


class Failure(Exception):
    """A request that brought no usable answer. retry_after: seconds that the server asked to wait, where it did."""

    def __init__(self, reason: str, *, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Broken(Failure):
    """The connection broke or was not made, or nothing came in time: the server may be gone."""


class Late(Broken):
    """Nothing came in time."""


class Busy(Failure):
    """The server has no answer now (429, 5xx)."""


class BadAnswer(Failure):
    """An answer came and is not what was asked for."""


class Refused(Failure):
    """The server will not answer this request (4xx), however often it is asked."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"HTTP {status}: {reason}")
        self.status = status


def open_client(key: str = "") -> httpx2.AsyncClient:
    """A client without time-outs of its own, except for connecting: see `send`. key: bearer token, if any."""
    return httpx2.AsyncClient(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
        verify=_certificates(),
        # Never through a proxy of the environment, which would see the key: this machine is reached directly.
        mounts={f"all://{host}": None for host in LOOPBACK_HOSTS},
    )


@cache
def _certificates() -> SSLContext:
    # Reading them takes longer than a step's requests to a server next door.
    return httpx2.create_ssl_context()


async def send(client: httpx2.AsyncClient, url: str, call: Call, *, timeout_s: float) -> Any:
    """What the server answers to one attempt: JSON, or text where the call says so. Raises a Failure.

    timeout_s: seconds for the whole attempt. A cancelled or timed-out attempt closes its connection, on which servers
    abort the work.
    """
    try:
        async with asyncio.timeout(timeout_s):
            response = await client.request("GET" if call.body is None else "POST", url + call.path, json=call.body)
    except TimeoutError:
        raise Late(f"no answer within {timeout_s:g} s") from None
    except httpx2.TransportError as error:
        raise Broken(str(error) or type(error).__name__) from error
    except httpx2.RequestError as error:
        raise BadAnswer(str(error)) from error
    if response.status_code >= 300:
        raise _refusal(response)
    if not call.json:
        return response.text
    try:
        return response.json()
    except ValueError:
        raise BadAnswer(f"the answer is not JSON: {_excerpt(response.text)!r}") from None


def _refusal(response: httpx2.Response) -> Failure:
    reason = _reason(response.text) or response.reason_phrase
    if response.status_code in BUSY or response.status_code >= 500:
        wait = _retry_after(response.headers.get("Retry-After"))
        return Busy(f"HTTP {response.status_code}: {reason}", retry_after=wait)
    return Refused(response.status_code, reason)


def _reason(text: str) -> str:
    """The message inside an error's JSON, in whichever place this server has it; else the text itself."""
    try:
        content = json.loads(text)
    except ValueError:
        return _excerpt(text)
    for key in ("error", "message", "error_message", "detail"):
        if isinstance(content, dict) and content.get(key):
            content = content[key]
    return _excerpt(content if isinstance(content, str) else json.dumps(content))


def _excerpt(text: str) -> str:
    text = redact(" ".join(text.split()))
    return text if len(text) <= LONGEST_EXCERPT else f"{text[:LONGEST_EXCERPT]}..."


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header: it holds seconds or a date (RFC 9110, 10.2.3). None where it holds neither."""
    if value is None:
        return None
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):  # TypeError: a date without a time zone
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    return None


def delay_before(attempt: int, failure: Failure, *, longest_s: float) -> float:
    """Seconds to wait before further attempt `attempt` (from 0): what the server asked for, else doubling with jitter.

    Many requests fail together when a server does; the jitter keeps them from coming back together.
    """
    if failure.retry_after is not None:
        return min(failure.retry_after, longest_s)
    return min(FIRST_DELAY_SECONDS * 2**attempt, LONGEST_DELAY_SECONDS, longest_s) * _jitter.uniform(0.5, 1.0)


async def together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, in order. The first failure cancels the others, and is raised when they have ended."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as failures:
        first = failures.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]


def run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `work()` on an event loop in a thread of its own, and wait for it.

    A signal's exception is so raised in the waiting thread and never inside the loop, where it would leave tasks half
    done: the work is cancelled, its end is awaited, and the exception goes on.
    """
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = Future()
    stopping = threading.Event()

    async def main() -> T:
        started.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        if stopping.is_set():
            raise asyncio.CancelledError
        return await work()

    with ThreadPoolExecutor(1, thread_name_prefix="retrain-http") as pool:
        try:
            return pool.submit(lambda: asyncio.run(main())).result()
        except BaseException:
            stopping.set()
            if started.done():
                loop, task = started.result()
                assert task is not None
                with suppress(RuntimeError):  # the loop has closed: the work ended by itself
                    loop.call_soon_threadsafe(task.cancel)
            raise
