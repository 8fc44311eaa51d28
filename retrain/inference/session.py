"""One call's conversation with the servers: attempts, outages, and the adapter that a restarted server has lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import httpx2

from retrain.http import BadAnswer, Broken, Busy, Call, Failure, Refused, delay_before, send
from retrain.inference import ServerLost
from retrain.inference.checks import check_logprobs, check_sample
from retrain.inference.dialects import Adapter, Ask, Dialect, Sample, Scoring, Unreproducible, as_list, at
from retrain.types import RetrainError

T = TypeVar("T")

POLL_SECONDS = 0.5
ONCE_SECONDS = 5.0
REMIND_SECONDS = 30.0


class NotLoaded(Exception):
    """The server is there and does not take the adapter: its reason."""


@dataclass
class Server:
    """model: the base model's name there. context: its longest sequence in tokens, None where it does not say.
    outstanding: tokens at most that it still owes."""

    url: str
    model: str = ""
    context: int | None = None
    outstanding: int = 0


@dataclass(frozen=True)
class Terms:
    """On which the servers are spoken to, the same for a whole run. tokenizer, vocab_size: the trainer's."""

    dialect: Dialect
    tokenizer: Any
    vocab_size: int
    timeout_s: float
    retries: int
    say: Callable[[str], None]


@dataclass(frozen=True)
class Recheck:
    """What a restarted server has to show: `judge` gets its log-probs of ids[1:], and raises where they are wrong."""

    ids: list[int]
    judge: Callable[[Server, list[float]], None]


class Session:
    """Lives on one event loop, for one call of the engine. adapter: what every server is to serve, None for the base.

    Each request is one awaited call, which returns one answer or raises: nothing is lost, and nothing comes twice.
    recheck: of a server that was restarted, before anything else is asked of it.
    """

    def __init__(
        self,
        client: httpx2.AsyncClient,
        terms: Terms,
        adapter: Adapter | None,
        recheck: Recheck | None = None,
    ) -> None:
        self.client, self.terms, self.adapter, self.recheck = client, terms, adapter, recheck
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._restoring: dict[str, asyncio.Lock] = {}
        self._restored: dict[str, int] = {}  # how often each server was brought back
        self._given_up: dict[str, ServerLost] = {}

    async def sample(self, server: Server, ask: Ask) -> Sample | None:
        """One completion; None where the server's text does not tell its tokens. Raises as `ask` does."""

        def read(answer: Any) -> Sample:
            sample = self.terms.dialect.read(answer, ask, self.terms.tokenizer)
            check_sample(sample, ask, self.terms.vocab_size)
            return sample

        try:
            return await self.ask(server, self.terms.dialect.ask(ask, server.model), read)
        except Unreproducible:
            return None

    async def score(self, server: Server, ids: list[int]) -> list[float] | None:
        """Log-probs of ids[1:] under the adapter; None where the server cannot tell. Raises as `ask` does."""
        scoring = self.terms.dialect.scoring
        if scoring is None:
            return None
        assert self.adapter is not None
        return await self.ask(server, scoring.ask(self.adapter, ids), partial(read_scores, scoring, ids))

    async def ask(self, server: Server, call: Call, read: Callable[[Any], T]) -> T:
        """What `read` makes of the answer. Raises ServerLost when every attempt failed, RetrainError when refused.

        An attempt whose answer was lost is made again as it was, seed included, and only then: `read` sees each answer
        that arrives, and one result leaves.
        """
        slot = self._slots.setdefault(server.url, asyncio.Semaphore(self.terms.dialect.concurrent))

        async def attempt() -> T:
            async with slot:
                try:
                    return read(await self._send(server, call))
                except Refused as refusal:
                    if await self._has_lost_adapter(server):
                        raise Broken("it was restarted and has lost the adapter") from None
                    raise RetrainError(f"inference.url: {server.url} refuses a request: {refusal}") from refusal

        return await self._persist(server, attempt)

    async def once(self, server: Server, call: Call) -> Any:
        """The answer to one short attempt. Raises a Failure."""
        return await send(self.client, server.url, call, timeout_s=ONCE_SECONDS)

    async def is_healthy(self, server: Server) -> None:
        """Raises a Failure where it is not."""
        await self.once(server, Call(self.terms.dialect.health, json=False))

    async def models(self, server: Server) -> list[dict[str, Any]]:
        """What /v1/models lists, in one attempt: base models, and (where the dialect says so) adapters."""
        entries = as_list(await self.once(server, Call("/v1/models")), "data")
        for entry in entries:
            at(entry, "id")
        return entries

    async def load(self, server: Server) -> None:
        """Make the server serve the adapter. Raises ServerLost, or NotLoaded with the server's reason."""

        async def attempt() -> None:
            try:
                await self._load(server)
            except Refused as refusal:
                # A network folder may show there a little later what was written here.
                raise Busy(str(refusal)) from refusal

        try:
            await self._persist(server, attempt)
        except ServerLost as lost:
            if isinstance(lost.__cause__, Busy):
                raise NotLoaded(str(lost.__cause__)) from lost
            raise

    async def unload(self, server: Server, adapter: Adapter) -> None:
        """Drop an adapter, if the server still has it. One attempt: what stays behind does no harm."""
        if self.terms.dialect.unload is not None:
            with suppress(Failure):
                await self.once(server, self.terms.dialect.unload(adapter))

    async def _send(self, server: Server, call: Call) -> Any:
        return await send(self.client, server.url, call, timeout_s=self.terms.timeout_s)

    async def _persist(self, server: Server, work: Callable[[], Awaitable[T]]) -> T:
        attempt = 0
        while True:
            life = self._restored.get(server.url, 0)
            try:
                return await work()
            except (Broken, Busy, BadAnswer) as failure:
                if attempt == self.terms.retries:
                    raise self._lost(server, failure) from failure
                if isinstance(failure, Broken):
                    await self._restore(server, life, failure)
                await asyncio.sleep(delay_before(attempt, failure, longest_s=self.terms.timeout_s))
            attempt += 1

    async def _load(self, server: Server) -> None:
        assert self.adapter is not None and self.terms.dialect.load is not None
        *preparing, loading = self.terms.dialect.load(self.adapter)
        for call in preparing:
            with suppress(Refused):  # there was nothing to prepare
                await self._send(server, call)
        await self._send(server, loading)

    async def _has_lost_adapter(self, server: Server) -> bool:
        if self.adapter is None or not self.terms.dialect.listed:
            return False
        return self.adapter.name not in [entry["id"] for entry in await self.models(server)]

    async def _restore(self, server: Server, life: int, failure: Failure) -> None:
        """Return when the server answers again and has the adapter.

        life: how often it had been brought back when the failed request was sent; requests that fail together wait for
        one restoration.
        """
        async with self._restoring.setdefault(server.url, asyncio.Lock()):
            if server.url in self._given_up:
                raise self._given_up[server.url]
            if self._restored.get(server.url, 0) == life:
                try:
                    await self._wait(server, failure)
                except ServerLost as lost:
                    self._given_up[server.url] = lost
                    raise
                self._restored[server.url] = life + 1

    async def _wait(self, server: Server, failure: Failure) -> None:
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
            if waited > self.terms.timeout_s:
                raise self._lost(server, failure)
            if reminded is None or waited - reminded > REMIND_SECONDS:
                left = self.terms.timeout_s - waited
                self.terms.say(f"{server.url} does not answer ({failure}): waiting for it, {left:.0f} s at most")
                reminded = waited
            await asyncio.sleep(POLL_SECONDS)

    async def _revive(self, server: Server, *, was_away: bool) -> None:
        """Raises a Failure while the server is away."""
        await self.is_healthy(server)
        if await self._has_lost_adapter(server):
            await self._load(server)
            await self._recheck(server)
            self.terms.say(f"{server.url} was restarted: the adapter is loaded again")
        elif was_away:
            self.terms.say(f"{server.url} answers again")

    async def _recheck(self, server: Server) -> None:
        scoring = self.terms.dialect.scoring
        if self.recheck is None or scoring is None:
            return
        assert self.adapter is not None
        # Without `ask`, which would wait for this very restoration when the server goes away again.
        answer = await self._send(server, scoring.ask(self.adapter, self.recheck.ids))
        self.recheck.judge(server, read_scores(scoring, self.recheck.ids, answer))

    def _lost(self, server: Server, failure: Failure) -> ServerLost:
        what = "gives no usable answer" if isinstance(failure, BadAnswer) else "does not answer"
        return ServerLost(
            f"inference.url: {server.url} {what}: {failure} (inference.request_timeout_s = {self.terms.timeout_s:g}, "
            f"retries = {self.terms.retries}). Look at its log, start it again, and resume the run"
        )


def read_scores(scoring: Scoring, ids: list[int], answer: Any) -> list[float]:
    """Raises BadAnswer."""
    logprobs = scoring.read(answer, ids)
    check_logprobs(logprobs)
    return logprobs
