"""The SDK's HTTP client, watched: how often it asks, is told to wait, or finds the service gone. Imports httpx (1)."""

from __future__ import annotations

import asyncio
import time

import httpx

CONNECT_SECONDS, REQUEST_SECONDS = 5.0, 60.0
# The SDK asks for a result again at once after an error of the server.
PAUSE_SECONDS = 0.5
HEARTBEAT, RESULT = "/session_heartbeat", "/retrieve_future"


class Monitor:
    """Counts, written by the SDK's thread and read by any. failing_since: of what is asked, and of heartbeats."""

    def __init__(self) -> None:
        self.requests = self.retries = self.rate_limits = 0
        self.reason = ""
        self._failing_since: dict[str, float] = {}

    def failing_for(self) -> float:
        """Seconds since the service last gave a usable answer to what it was asked, 0.0 while it does."""
        since = min(self._failing_since.values(), default=None)
        return 0.0 if since is None else time.monotonic() - since

    def failed(self, path: str, reason: str) -> None:
        self.retries += 1
        self.reason = reason
        self._failing_since.setdefault(_kind(path), time.monotonic())

    def answered(self, path: str, *, limited: bool = False) -> None:
        """limited: it asked to come again later, which a service that is gone does not."""
        self.retries += limited
        self.rate_limits += limited
        # Work that is answered proves the heartbeat's route; a heartbeat does not prove that work is done.
        self._failing_since.pop("heartbeat", None)
        if _kind(path) == "work":
            self._failing_since.pop("work", None)


def _kind(path: str) -> str:
    return "heartbeat" if path.endswith(HEARTBEAT) else "work"


class Watched(httpx.AsyncBaseTransport):
    """Passes requests on, and tells the monitor what became of them."""

    def __init__(self, inner: httpx.AsyncBaseTransport, monitor: Monitor) -> None:
        self.inner, self.monitor = inner, monitor

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.monitor.requests += 1
        try:
            response = await self.inner.handle_async_request(request)
        except httpx.TransportError as error:
            # A result that is long in coming is asked for again: that is how it is waited for.
            if not (isinstance(error, httpx.ReadTimeout) and path.endswith(RESULT)):
                self.monitor.failed(path, str(error) or type(error).__name__)
            raise
        if response.status_code >= 500:
            self.monitor.failed(path, f"HTTP {response.status_code}")
            await asyncio.sleep(PAUSE_SECONDS)
        else:
            self.monitor.answered(path, limited=response.status_code == 429)
        return response

    async def aclose(self) -> None:
        await self.inner.aclose()


def open_client(monitor: Monitor) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=1000, max_keepalive_connections=20)
    transport = httpx.AsyncHTTPTransport(http2=True, limits=limits)
    timeout = httpx.Timeout(REQUEST_SECONDS, connect=CONNECT_SECONDS)
    return httpx.AsyncClient(transport=Watched(transport, monitor), timeout=timeout, follow_redirects=True)
