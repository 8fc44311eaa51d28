"""A plain connection from every process of a run to the first one: it tells at once that one has died, or has ended
while the others go on, and why. Torch-free.

Collectives alone would not: a process that waits for a dead one waits until a time-out, or fails with a message about
sockets. Each process counts the collectives that it has begun. One that ends says so, with its count; whoever has begun
more than that waits in vain, and ends as well. Those that have begun the same number come to their own end.

The connections carry JSON. A word that the processes share beforehand keeps strangers out.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

LOOK_SECONDS = 0.05
# A machine that vanishes closes no connection: the operating system asks after so many seconds, so often.
ALIVE_OPTIONS = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}
# What comes of a death may be told before the death itself is noticed.
DEATH_FIRST_SECONDS = 0.5
ECHO_SECONDS = 5.0
HELLO_SECONDS = 30.0


@dataclass(frozen=True)
class Goodbye:
    """begun: collectives begun, by their group. error: why the process ends, None where it is done. status: its exit
    status. echo: whether the error only follows from another process's end."""

    begun: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    status: int = 0
    echo: bool = False


class Lifeline:
    """say: takes the line that tells why the run is over, before the process ends; called from another thread.

    hint: what to do about it, in one sentence; set by whoever knows.
    """

    def __init__(self, rank: int, size: int, say: Callable[[str], None]) -> None:
        self.rank, self.size, self.say = rank, size, say
        self.hint: Callable[[], str] = lambda: ""
        self.begun: Counter[str] = Counter()
        self._peers: dict[int, socket.socket] = {}
        self._goodbyes: dict[int, Goodbye] = {}
        self._gone: set[int] = set()
        self._leaving = False
        self._change = threading.Condition()
        # A torchrun that is killed outright ends nobody else.
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def begin(self, group: str) -> None:
        """A collective of `group` begins."""
        self.begun[group] += 1

    def fail(self, group: str, error: str, status: int) -> NoReturn:
        """This process cannot do its part of the collective of `group` that it has begun: the others wait in vain."""
        self.begun[group] -= 1
        if self.rank == 0:
            self._end(error, status)
        else:
            self._send(self._peers[0], asdict(Goodbye(dict(self.begun), error, status)))
            time.sleep(ECHO_SECONDS)  # the first process ends this one, and says why
        os._exit(status)

    # ---- connections ------------------------------------------------------------------------------------------------

    def listen(self, host: str) -> socket.socket:
        """Of the first process: where the others connect to; `accept` takes them."""
        return socket.create_server((host, 0), backlog=self.size)

    def accept(self, server: socket.socket, word: str, *, seconds: float) -> None:
        """Wait for all others. Raises TimeoutError where one does not come for so long."""
        server.settimeout(seconds)
        with server:
            while len(self._peers) < self.size - 1:
                connection, _ = server.accept()
                connection.settimeout(HELLO_SECONDS)
                with suppress(OSError, ValueError):
                    # One at a time and no more than the line: what follows is for `_listen`.
                    hello = json.loads(_line(connection))
                    if hello == [int(hello[0]), word] and 0 < hello[0] < self.size:
                        self._peers[hello[0]] = connection
                        continue
                connection.close()
        self._watch()

    def connect(self, address: tuple[str, int], word: str) -> None:
        """Raises OSError."""
        connection = socket.create_connection(address, timeout=HELLO_SECONDS)
        connection.sendall(json.dumps([self.rank, word]).encode() + b"\n")
        self._peers[0] = connection
        self._watch()

    def _watch(self) -> None:
        for peer, connection in self._peers.items():
            connection.settimeout(None)
            _keep_alive(connection)
            threading.Thread(target=self._listen, args=(peer, connection), name=f"rank {peer}", daemon=True).start()
        threading.Thread(target=self._look, name="lifeline", daemon=True).start()

    def _listen(self, peer: int, connection: socket.socket) -> None:
        with suppress(OSError):
            while line := _line(connection):
                message = json.loads(line)
                if "over" in message:
                    os._exit(message["over"])
                with self._change:
                    self._goodbyes[peer] = Goodbye(**message)
                    self._change.notify_all()
        with self._change:
            self._gone.add(peer)
            self._change.notify_all()
            unexpected = peer not in self._goodbyes and not self._leaving
        if unexpected:
            self._end(f"the process of rank {peer} died: it was killed, perhaps for want of memory", 1)

    # ---- ending -----------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Ends this process where it waits for one that has ended."""
        noticed: dict[int, float] = {}
        while True:
            with self._change:
                if not self._goodbyes and self._parent is None:
                    self._change.wait()
            time.sleep(LOOK_SECONDS)
            if self._parent not in (None, os.getppid()):
                os._exit(1)
            if self._leaving:
                continue
            for peer, goodbye in dict(self._goodbyes).items():
                if all(count <= goodbye.begun.get(group, 0) for group, count in dict(self.begun).items()):
                    continue
                since = noticed.setdefault(peer, time.monotonic())
                if time.monotonic() - since > (ECHO_SECONDS if goodbye.echo else DEATH_FIRST_SECONDS):
                    self._end(f"rank {peer}: {goodbye.error or 'ended before the others'}", goodbye.status or 1)

    def _end(self, line: str, status: int) -> None:
        """The first process tells it, and the others follow; where the first one died, each tells it."""
        with self._change:
            if self._leaving:
                return
            if self.rank == 0 or 0 not in self._goodbyes:
                self.say(" ".join(filter(None, (f"{line}.", self._hint()))))
            for connection in self._peers.values():
                self._send(connection, {"over": status})
            os._exit(status)

    def _hint(self) -> str:
        try:
            return self.hint()
        except Exception:  # noqa: BLE001 - the line itself must be said
            return ""

    def leave(self, goodbye: Goodbye) -> dict[int, Goodbye]:
        """Say goodbye and wait for the others', so that all processes end together. What others said: to the first
        process everybody, to the others the first one.

        Does not return where a collective was left in which others wait.
        """
        if goodbye.echo:
            time.sleep(ECHO_SECONDS)  # the process ends meanwhile, with the cause
        with self._change:
            self._leaving = self.rank == 0
            for connection in self._peers.values():
                self._send(connection, asdict(goodbye))
            for peer in self._peers:
                # The first process lets go when it has heard of all.
                heard = self._goodbyes if self.rank == 0 else {}
                self._change.wait_for(lambda peer=peer, heard=heard: peer in self._gone or peer in heard)
            self._leaving = True
        for connection in self._peers.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        return dict(self._goodbyes)

    def missing(self) -> set[int]:
        """Of those that this process hears from: who ended without a goodbye."""
        return set(self._peers) - set(self._goodbyes)

    def _send(self, connection: socket.socket, message: dict[str, Any]) -> None:
        with suppress(OSError):
            connection.sendall(json.dumps(message).encode() + b"\n")


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in ALIVE_OPTIONS.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _line(connection: socket.socket) -> bytes:
    """Up to the end of a line, or what there was before the end of the connection."""
    line = b""
    while not line.endswith(b"\n") and (byte := connection.recv(1)):
        line += byte
    return line if line.endswith(b"\n") else b""
