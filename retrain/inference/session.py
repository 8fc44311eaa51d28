"""One call's conversation with the servers: attempts, outages, and the adapters that a restarted server has lost."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import httpx2

from retrain.http import BadAnswer, Broken, Busy, Call, Failure, Late, Refused, delay_before, send
from retrain.inference import ServerLost
from retrain.inference.checks import check_logprobs, check_sample
from retrain.inference.dialects import Adapter, Ask, Dialect, Sample, Scoring, Unreproducible, as_list, at
from retrain.inference.fleet import Fleet, Server, Version
from retrain.types import RetrainError

T = TypeVar("T")

POLL_SECONDS = 0.5
ONCE_SECONDS = 5.0
REMIND_SECONDS = 30.0
# How long a server that has gone is waited for where there are others.
PATIENCE_SECONDS = 3.0
LOCK_SECONDS = 0.02


class NotLoaded(Exception):
    """The server is there and does not take the adapter: its reason."""


class Gone(Exception):
    """The server was dropped: ask another. As a message, why, as it would be told if there were none."""


@dataclass(frozen=True)
class Terms:
    """On which the servers are spoken to, the same for a whole run. tokenizer, vocab_size: the trainer's.

    prove(session, server, version): raises RetrainError where a server that was away does not serve the version, a
    Failure where it does not answer.
    """

    dialect: Dialect
    tokenizer: Any
    vocab_size: int
    timeout_s: float
    retries: int
    say: Callable[[str], None]
    prove: Callable[[Session, Server, Version], Awaitable[None]]


class Session:
    """Lives on one event loop, for one call of the engine.

    Each request is one awaited call, which returns one answer or raises: nothing is lost, and nothing comes twice.
    """

    def __init__(self, client: httpx2.AsyncClient, terms: Terms, fleet: Fleet) -> None:
        self.client, self.terms, self.fleet = client, terms, fleet
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._asking: dict[str, set[asyncio.Timeout]] = {server.url: set() for server in fleet.servers}

    async def sample(self, server: Server, ask: Ask) -> Sample | None:
        """One completion; None where the server's text does not tell its tokens. Raises as `ask` does."""
        try:
            return await self.ask(server, self.terms.dialect.ask(ask, server.model), partial(self.read_sample, ask))
        except Unreproducible:
            return None

    def read_sample(self, ask: Ask, answer: Any) -> Sample:
        """Raises BadAnswer, Unreproducible."""
        sample = self.terms.dialect.read(answer, ask, self.terms.tokenizer)
        check_sample(sample, ask, self.terms.vocab_size)
        return sample

    async def score(self, server: Server, adapter: Adapter | None, ids: list[int]) -> list[float] | None:
        """Log-probs of ids[1:] under the adapter; None where the server cannot tell. Raises as `ask` does."""
        scoring = self.terms.dialect.scoring
        if scoring is None:
            return None
        return await self.ask(server, scoring.ask(adapter, server.model, ids), partial(read_scores, scoring, ids))

    async def ask(self, server: Server, call: Call, read: Callable[[Any], T]) -> T:
        """What `read` makes of the answer. Raises Gone when every attempt failed and there are other servers,
        ServerLost when there are none, RetrainError when refused.

        An attempt whose answer was lost is made again as it was, seed included, and only then: `read` sees each answer
        that arrives, and one result leaves.
        """
        slot = self._slots.setdefault(server.url, asyncio.Semaphore(self.terms.dialect.concurrent))

        async def attempt() -> T:
            async with slot:
                try:
                    return read(await self.send(server, call))
                except Refused as refusal:
                    if await self._lost(server):
                        raise Broken("it was restarted and has lost the adapter") from None
                    raise RetrainError(f"inference.url: {server.url} refuses a request: {refusal}") from refusal

        asking, scope = self._asking[server.url], asyncio.timeout(None)
        try:
            async with scope:
                asking.add(scope)
                return await self._persist(server, attempt)
        except TimeoutError:
            raise Gone(f"inference.url: {server.url} was dropped") from None
        finally:
            asking.discard(scope)

    def hang_up(self, server: Server) -> None:
        """End what was asked of a server that has been dropped: each of these calls raises Gone."""
        asking = self._asking[server.url]
        while asking:
            asking.pop().reschedule(0)

    async def once(self, server: Server, call: Call) -> Any:
        """The answer to one short attempt. Raises a Failure."""
        return await send(self.client, server.url, call, timeout_s=ONCE_SECONDS)

    async def send(self, server: Server, call: Call) -> Any:
        """The answer to one attempt. Raises a Failure."""
        return await send(self.client, server.url, call, timeout_s=self.terms.timeout_s)

    async def is_healthy(self, server: Server) -> None:
        """Raises a Failure where it is not."""
        await self.once(server, Call(self.terms.dialect.health, json=False))

    async def models(self, server: Server) -> list[dict[str, Any]]:
        """What /v1/models lists, in one attempt: base models, and (where the dialect says so) adapters."""
        entries = as_list(await self.once(server, Call("/v1/models")), "data")
        for entry in entries:
            at(entry, "id")
        return entries

    async def load(self, server: Server, version: Version) -> None:
        """Make the server serve the version. Raises Gone, ServerLost, or NotLoaded with the server's reason."""
        attempts = 0

        async def attempt() -> None:
            nonlocal attempts
            attempts += 1
            try:
                await self._load(server, version)
            except (Refused, Busy) as failure:
                # Servers refuse an adapter with a 500, too; one that is not well is not meant.
                if attempts > self.terms.retries and await self._is_well(server):
                    raise NotLoaded(str(failure)) from failure
                # Also when refused: a network folder may show there a little later what was written here.
                raise failure if isinstance(failure, Busy) else Busy(str(failure)) from failure

        await self._persist(server, attempt)
        server.has.add(version.name)

    async def give(self, server: Server, version: Version) -> None:
        """Load a version on a server that lost it, and have it proven, in one attempt. One that is withdrawn meanwhile
        is left. Raises a Failure, RetrainError."""
        try:
            await self._load(server, version)
            await self.terms.prove(self, server, version)
        except Refused:
            if self.fleet.expects(version):
                raise
        else:
            server.has.add(version.name)

    async def unload(self, server: Server, adapter: Adapter) -> None:
        """Drop an adapter, if the server still has it. One attempt: what stays behind does no harm."""
        if self.terms.dialect.unload is not None:
            with suppress(Failure):
                await self.once(server, self.terms.dialect.unload(adapter))

    async def _load(self, server: Server, version: Version) -> None:
        if version.adapter is not None and self.terms.dialect.load is not None:
            *preparing, loading = self.terms.dialect.load(version.adapter)
            async with held(server.loading):
                for call in preparing:
                    with suppress(Refused):  # there was nothing to prepare
                        await self.send(server, call)
                await self.send(server, loading)

    # ---- outages ----------------------------------------------------------------------------------------------------

    async def _persist(self, server: Server, work: Callable[[], Awaitable[T]]) -> T:
        attempt = 0
        while True:
            life = server.life
            try:
                return await work()
            except (Broken, Busy, BadAnswer) as failure:
                # What had a whole time-out to answer has had its chance, where there are others.
                late = isinstance(failure, Late) and not self.fleet.is_last(server)
                if late or attempt == self.terms.retries:
                    raise self._given_up(server, life, failure) from failure
                if isinstance(failure, Broken):
                    await self._restore(server, life, failure)
                await asyncio.sleep(delay_before(attempt, failure, longest_s=self.terms.timeout_s))
            attempt += 1

    async def _is_well(self, server: Server) -> bool:
        with suppress(Failure):
            await self.is_healthy(server)
            return True
        return False

    async def _lost(self, server: Server) -> list[Version]:
        """The versions that the server was given and does not list. Raises a Failure."""
        if not self.terms.dialect.listed or not server.has:
            return []
        return self.fleet.missing(server, [entry["id"] for entry in await self.models(server)])

    async def _restore(self, server: Server, life: int, failure: Failure) -> None:
        """Return when the server answers again and has its adapters. Raises Gone, ServerLost.

        life: the one in which the request that failed was sent; requests that fail together wait for one restoration.
        """
        vain = server.lost
        async with held(server.restoring):
            if server.lost != vain:
                raise self._given_up(server, life, failure)
            if server.life == life:
                await self._wait(server, life, failure)
                self.fleet.restored(server)
            elif not server.alive:
                raise Gone(self._message(server, failure))

    async def _wait(self, server: Server, life: int, failure: Failure) -> None:
        began, reminded = time.monotonic(), None
        while True:
            try:
                await self._revive(server, was_away=reminded is not None)
                return
            except (Broken, Busy, BadAnswer) as latest:
                failure = latest
            except Refused as refusal:
                raise RetrainError(f"{server.url} was restarted, and is not as it was: {refusal}") from refusal
            waited = time.monotonic() - began
            if waited > min(PATIENCE_SECONDS, self.terms.timeout_s) and self.fleet.drop(server, life, str(failure)):
                raise Gone(self._message(server, failure))
            if waited > self.terms.timeout_s:
                server.lost += 1
                raise ServerLost(self._message(server, failure))
            if self.fleet.is_last(server) and (reminded is None or waited - reminded > REMIND_SECONDS):
                left = self.terms.timeout_s - waited
                self.terms.say(f"{server.url} does not answer ({failure}): waiting for it, {left:.0f} s at most")
                reminded = waited
            await asyncio.sleep(POLL_SECONDS)

    async def _revive(self, server: Server, *, was_away: bool) -> None:
        """Raises a Failure while the server is away."""
        await self.is_healthy(server)
        lost = await self._lost(server)
        for version in lost:
            await self.give(server, version)
        if lost:
            self.terms.say(f"{server.url} was restarted: the adapter is loaded again")
        elif was_away:
            self.terms.say(f"{server.url} answers again")

    def _given_up(self, server: Server, life: int, failure: Failure) -> Gone | ServerLost:
        message = self._message(server, failure)
        return Gone(message) if self.fleet.drop(server, life, str(failure)) else ServerLost(message)

    def _message(self, server: Server, failure: Failure) -> str:
        what = "gives no usable answer" if isinstance(failure, BadAnswer) else "does not answer"
        return (
            f"inference.url: {server.url} {what}: {failure} (inference.request_timeout_s = {self.terms.timeout_s:g}, "
            f"retries = {self.terms.retries}). Look at its log, start it again, and resume the run"
        )


@asynccontextmanager
async def held(lock: threading.Lock) -> AsyncIterator[None]:
    """A lock between event loops, each in a thread of its own: neither stands still while it waits."""
    while not lock.acquire(blocking=False):
        await asyncio.sleep(LOCK_SECONDS)
    try:
        yield
    finally:
        lock.release()


def read_scores(scoring: Scoring, ids: list[int], answer: Any) -> list[float]:
    """Raises BadAnswer."""
    logprobs = scoring.read(answer, ids)
    check_logprobs(logprobs)
    return logprobs
