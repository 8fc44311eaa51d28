"""Many servers as one: who is asked next, and how one that went comes back."""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, NoReturn, TypeVar

from retrain.http import BadAnswer, Busy, Failure, Refused, together
from retrain.inference import ServerLost, Serving
from retrain.inference.dialects import Ask, Sample
from retrain.inference.fleet import Fleet, Server
from retrain.inference.session import Gone, Session
from retrain.inference.start import identify
from retrain.types import ConfigError, RetrainError

T = TypeVar("T")

# How often the sampling side look whether a server was dropped; how long a look at one may take.
TICK_SECONDS, LOOK_LIMIT_SECONDS = 0.5, 20.0
# A server is taken for at most so many times slower than the fastest: a bad moment is not held against it for ever.
MOST_UNEVEN = 8.0


async def spread(session: Session, fleet: Fleet, groups: Sequence[Sequence[Ask]]) -> list[list[Sample | None]]:
    """Every completion once, from the server that will be done first when its turn comes.

    A group stays together, so that its prompt is computed once; it is split only where servers would stand idle. What a
    dropped server leaves undone is asked of another, and what it has done is kept. Raises ServerLost, RetrainError.
    """
    pieces = math.ceil(len(fleet.alive) / len(groups))
    size = math.ceil(max(map(len, groups)) / pieces)
    turns = Turns(fleet, session.terms.dialect.concurrent)
    # Each server may fail a request as often as a single one may.
    most_moves = (session.terms.retries + 1) * len(fleet.servers)

    async def sample(server: Server, ask: Ask) -> Sample | Gone | None:
        try:
            answer = await session.sample(server, ask)
        except Gone as gone:
            return gone
        server.served += 1
        turns.delivered[server] += room(ask)
        return answer

    async def piece(asks: Sequence[Ask]) -> list[Sample | None]:
        done: dict[int, Sample | None] = {}
        moves = 0
        while left := [place for place in range(len(asks)) if place not in done]:
            gone = None
            async with turns.next([asks[place] for place in left]) as server:
                answers = await together(sample(server, asks[place]) for place in left)
            for place, answer in zip(left, answers, strict=True):
                if isinstance(answer, Gone):
                    gone = answer
                else:
                    done[place] = answer
            moves += 1
            if gone is not None and moves > most_moves:
                raise ServerLost(str(gone))
        return [done[place] for place in range(len(asks))]

    async def group(asks: Sequence[Ask]) -> list[Sample | None]:
        parts = await together(piece(asks[start : start + size]) for start in range(0, len(asks), size))
        return [sample for part in parts for sample in part]

    samples = await together(map(group, groups))
    turns.measure()
    return samples


def room(ask: Ask) -> int:
    """Tokens that a completion takes at most."""
    return len(ask.prompt) + ask.max_tokens


class Turns:
    """The requests of one call. outstanding, delivered: tokens at most that each server owes, and has answered."""

    def __init__(self, fleet: Fleet, concurrent: int) -> None:
        self.fleet, self.concurrent = fleet, concurrent
        self.outstanding: dict[Server, int] = defaultdict(int)
        self._requests: dict[Server, int] = defaultdict(int)
        self.delivered: dict[Server, int] = defaultdict(int)
        self._busy_since: dict[Server, float] = {}
        self._busy_seconds: dict[Server, float] = defaultdict(float)
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def next(self, asks: Sequence[Ask]) -> AsyncIterator[Server]:
        """Wait for a server with room, and count these requests as its own until they have ended."""
        owed = sum(map(room, asks))
        async with self._changed:
            while (server := self._choose(owed)) is None:
                await self._changed.wait()
            self.outstanding[server] += owed
            self._requests[server] += len(asks)
            self._busy_since.setdefault(server, time.monotonic())
            self._changed.notify()  # there may be room for the next one, too
        try:
            yield server
        finally:
            self.outstanding[server] -= owed
            self._requests[server] -= len(asks)
            if not self._requests[server]:
                self._busy_seconds[server] += time.monotonic() - self._busy_since.pop(server)
            async with self._changed:
                self._changed.notify()

    def _choose(self, owed: int) -> Server | None:
        """The one that, by its pace, is done first with `owed` tokens more; None while all are full."""
        alive = self.fleet.alive
        best = max(server.pace for server in alive)

        def seconds(server: Server) -> float:
            return (self.outstanding[server] + owed) / (max(server.pace or best, best / MOST_UNEVEN) or 1.0)

        return min((server for server in alive if self._requests[server] < self.concurrent), key=seconds, default=None)

    def measure(self) -> None:
        """Renew the pace of each server, half of it from this call. One that had no turn is given a better chance."""
        best = max(server.pace for server in self.fleet.servers)
        for server in self.fleet.servers:
            seconds = self._busy_seconds[server]
            now = self.delivered[server] / seconds if seconds else best
            server.pace = (server.pace + now) / 2 if server.pace else now


async def watched(session: Session, fleet: Fleet, serving: Serving, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, while servers that are dropped are hung up on and looked at again."""

    async def attend(server: Server) -> NoReturn:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if not server.alive:
                session.hang_up(server)
                if time.monotonic() >= server.look_at:
                    await readmit(session, fleet, serving, server)

    servers = fleet.servers if len(fleet.servers) > 1 else ()
    tasks = [asyncio.ensure_future(work), *(asyncio.ensure_future(attend(server)) for server in servers)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task.done()).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def readmit(session: Session, fleet: Fleet, serving: Serving, server: Server) -> None:
    """Look at a dropped server, and let it take part where it is the one that it was and serves what it has to.

    Nothing happens while it is away. Raises RetrainError where another has come back.
    """
    if not server.restoring.acquire(blocking=False):
        return  # the other thread is at it
    try:
        if server.alive:
            return  # the other thread was
        async with asyncio.timeout(min(LOOK_LIMIT_SECONDS, session.terms.timeout_s)):
            server.has.clear()
            await identify(session, server, serving)
            while missing := fleet.admit(server):
                for version in missing:
                    await session.give(server, version)
            while server.left_behind:
                adapter = server.left_behind.pop()
                if adapter not in [version.adapter for version in fleet.versions.values()]:
                    await session.unload(server, adapter)
    except (Refused, ConfigError) as error:
        raise RetrainError(f"{server.url} came back, and is not as it was: {error}") from error
    except (Busy, BadAnswer) as failure:
        fleet.look_later(server, f"it answers, and cannot take part yet: {failure}")
    except (Failure, TimeoutError):
        fleet.look_later(server)
    finally:
        server.restoring.release()
