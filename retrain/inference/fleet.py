"""The servers of a run and the policy versions that they have to serve: what two threads, one that samples and one
that stages versions, know together. No requests are made here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from retrain.inference.dialects import Adapter

# Until a dropped server is looked at again while sampling goes on; doubled for one that goes time and again.
LOOK_SECONDS, LONGEST_LOOK_SECONDS = 3.0, 60.0


@dataclass(frozen=True)
class Reference:
    """Token ids, and the trainer's log-probs of them, float32 [T]: of the fixed text's end or, where a server cannot
    score a given text, of what one sampled after its beginning."""

    tokens: list[int]
    expected: np.ndarray


@dataclass(frozen=True)
class Version:
    """adapter: None for the base model. reference: what a server that comes back has to show; None where nothing can
    be compared (yet)."""

    number: int
    adapter: Adapter | None
    reference: Reference | None

    @property
    def name(self) -> str:
        return self.adapter.name if self.adapter else ""


@dataclass(eq=False)
class Server:
    """model: the base model's name there. context: its longest sequence in tokens, None where it does not say.

    alive: whether it takes part. life: how often it was dropped, restored and admitted; what was sent in an earlier one
    says nothing about this one. lost: how often it was waited for in vain. has: names of the versions that it was given
    since it takes part. left_behind: adapters that were withdrawn while it was dropped. served: completions so far.
    pace: tokens per second, as measured; 0 before that. drops, look_at: how often it was dropped, and when
    (time.monotonic) it is to be looked at again. remarked: whether it was said why it does not come back although it
    answers.
    restoring: held by whoever brings it back. loading: held around the calls that load one adapter.
    """

    url: str
    model: str = ""
    context: int | None = None
    alive: bool = True
    life: int = 0
    lost: int = 0
    has: set[str] = field(default_factory=set)
    left_behind: list[Adapter] = field(default_factory=list)
    served: int = 0
    pace: float = 0.0
    drops: int = 0
    remarked: bool = False
    look_at: float = 0.0
    restoring: threading.Lock = field(default_factory=threading.Lock)
    loading: threading.Lock = field(default_factory=threading.Lock)


class Fleet:
    """Every change of who is alive and of what is to be served is made under one lock: a version is expected either of
    a server that is alive when it is staged, or of one that is admitted afterwards, and of none is it forgotten.

    base: what is served before there is a version. complete: whether every server was found; none is dropped before.
    """

    def __init__(self, urls: Iterable[str], say: Callable[[str], None]) -> None:
        self.servers = [Server(url) for url in urls]
        self.say = say
        self.base = Version(0, None, None)
        self.complete = False
        self._versions: dict[int, Version] = {}
        self._lock = threading.RLock()

    @property
    def alive(self) -> list[Server]:
        with self._lock:
            return [server for server in self.servers if server.alive]

    @property
    def versions(self) -> dict[int, Version]:
        with self._lock:
            return dict(self._versions)

    def is_last(self, server: Server) -> bool:
        """Whether the run has to wait for this one: it cannot do without."""
        with self._lock:
            return not self.complete or not any(other.alive for other in self.servers if other is not server)

    # ---- versions ---------------------------------------------------------------------------------------------------

    def expect(self, version: Version) -> list[Server]:
        """The servers that have to be given this version now. The others get it when they are admitted."""
        with self._lock:
            self._versions[version.number] = version
            return self.alive

    def forget(self, numbers: Iterable[int]) -> None:
        with self._lock:
            for number in numbers:
                if version := self._versions.pop(number, None):
                    for server in self.servers:
                        server.has.discard(version.name)
                        if not server.alive and version.adapter is not None:
                            server.left_behind.append(version.adapter)

    def expects(self, version: Version) -> bool:
        """Whether the version is (still) to be served."""
        with self._lock:
            return version.adapter is None or version.number in self._versions

    def missing(self, server: Server, there: Sequence[str]) -> list[Version]:
        """What the server was given in this life and is not among `there`."""
        with self._lock:
            return [v for v in self._versions.values() if v.name in server.has and v.name not in there]

    # ---- who takes part ---------------------------------------------------------------------------------------------

    def drop(self, server: Server, life: int, why: str) -> bool:
        """Go on without a server that failed in this life of it; False where it is the last one."""
        with self._lock:
            if self.is_last(server):
                return False
            if server.alive and server.life == life:
                server.alive, server.life = False, life + 1
                server.has.clear()
                server.pace, server.remarked = 0.0, False
                server.drops += 1
                self._plan_look(server)
                self.say(
                    f"{server.url} is dropped after {server.served} completions ({why}): {self._count()} left. It "
                    "takes part again when it answers again"
                )
            return True

    def restored(self, server: Server) -> None:
        """It was away, and is as it was."""
        with self._lock:
            server.life += 1

    def admit(self, server: Server) -> list[Version]:
        """What a dropped server still has to be given; where that is nothing, it takes part from here on."""
        with self._lock:
            wanted = list(self._versions.values()) or [self.base]
            missing = [version for version in wanted if version.name not in server.has]
            if not missing and not server.alive:
                server.alive, server.life = True, server.life + 1
                newest = max(self._versions, default=None)
                what = "the base model" if newest is None else f"policy version {newest}"
                self.say(f"{server.url} is back and serves {what}: {self._count()} take part")
            return missing

    def look_later(self, server: Server, remark: str = "") -> None:
        with self._lock:
            self._plan_look(server)
            if remark and not server.remarked:
                server.remarked = True
                self.say(f"{server.url}: {remark}")

    def _plan_look(self, server: Server) -> None:
        server.look_at = time.monotonic() + min(LOOK_SECONDS * 2 ** (server.drops - 1), LONGEST_LOOK_SECONDS)

    def _count(self) -> str:
        return f"{len(self.alive)} of {len(self.servers)} servers"
