"""The door to the Tinker SDK: connecting, waiting with patience, and what a failure means for the run.

The SDK tries again by itself, in places for ever. Here every wait ends once nothing usable has come for `patience_s`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2

from retrain.config.service import KINDS
from retrain.config.suggest import did_you_mean
from retrain.redact import redact
from retrain.types import ConfigError, RetrainError, ServerLost

if TYPE_CHECKING:
    from retrain.config import BackendConfig

T = TypeVar("T")

KEY_VARIABLE = "TINKER_API_KEY"
COMMAND_VARIABLE = "TINKER_CREDENTIAL_CMD"
POLL_SECONDS = 0.2
# An outage this short is not worth a line.
QUIET_SECONDS = 3.0
GREETING_SECONDS = 5.0
CLOSE_SECONDS = 2.0
SKYRL_NAME = "Tinker API Mock"
LONGEST_REASON = 300


class Service:
    """One session with a service. Not thread-safe; `say` takes lines from other threads."""

    def __init__(self, url: str, section: BackendConfig, say: Callable[[str], None]) -> None:
        """Raises ConfigError where SDK or key is missing, or nobody answers who speaks the API."""
        check_requirements()
        # The SDK would send the service reports about errors in this process.
        os.environ.setdefault("TINKER_TELEMETRY", "0")
        from retrain.backend.tinker.transport import Monitor, open_client

        self.monitor = Monitor()
        self.patience_s, self.say = section.patience_s, say
        self.name = url or os.environ.get("TINKER_BASE_URL", "") or "the Tinker service"
        self._said_at: float | None = None
        self._counted = (0, 0, 0)
        _forward_log(self)
        check_kind(self.name, section.service)
        self._http = open_client(self.monitor)
        self.client: Any = self.first(lambda: _connect(url, self._http))
        self.models: list[Any] = self.first(lambda: self.client.get_server_capabilities().supported_models)

    def first(self, work: Callable[[], T]) -> T:
        """As `call`, before anything was written: what goes wrong then is the config, or the service's address."""
        try:
            return self.call(work)
        except RetrainError as error:
            raise ConfigError(str(error)) from error

    def call(self, work: Callable[[], T]) -> T:
        """The result of `work`, which blocks. Raises as `wait` does."""
        return self.wait(in_thread(work))

    def wait(self, future: Any) -> Any:
        """The result of a future of the SDK. Raises ServerLost when the service is gone, RetrainError as it refuses."""
        return self.gather([lambda: future], at_once=1)[0]

    def gather(self, calls: Iterable[Callable[[], Any]], *, at_once: int) -> list[Any]:
        """Results of calls that return futures, in order, at most `at_once` under way. Raises as `wait` does."""
        results: dict[int, Any] = {}
        pending: dict[Future[Any], int] = {}
        waiting = iter(enumerate(calls))
        try:
            while True:
                for index, call in islice(waiting, at_once - len(pending)):
                    future = call()
                    pending[future if isinstance(future, Future) else future.future()] = index
                if not pending:
                    return [results[index] for index in range(len(results))]
                done = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED).done
                for future in done:
                    results[pending.pop(future)] = self._result(future)
                self._be_patient(idle=not done)
        finally:
            for future in pending:
                future.cancel()

    def _result(self, future: Future[T]) -> T:
        from tinker.lib.retryable_exception import RetryableException

        import tinker

        try:
            return future.result()
        except (tinker.APIConnectionError, TimeoutError, RetryableException) as error:
            raise self.lost(self._reason(error)) from error
        except (tinker.AuthenticationError, tinker.PermissionDeniedError) as error:
            raise RetrainError(
                f"{self.name} does not accept the key in {KEY_VARIABLE} ({self._reason(error)}). Set the right one in "
                "the environment or in .env"
            ) from error
        except tinker.APIStatusError as error:
            if error.status_code >= 500 or error.status_code in (408, 409, 429):
                raise self.lost(self._reason(error)) from error
            raise RetrainError(f"{self.name} refuses a request: {self._reason(error)}") from error
        # The SDK's own, and (ValueError) a request that was taken and then failed.
        except (tinker.TinkerError, ValueError) as error:
            raise RetrainError(f"{self.name} refuses a request: {self._reason(error)}") from error

    def lost(self, reason: str) -> ServerLost:
        return ServerLost(
            f"model.base_url: {self.name} gives no usable answer: {reason} (backend.patience_s = {self.patience_s:g}). "
            "See whether it is up, and resume the run"
        )

    def _be_patient(self, *, idle: bool) -> None:
        """Say that the service is away, and that it is back; ServerLost when it is away for too long."""
        away = self.monitor.failing_for()
        if idle and away > self.patience_s:
            raise self.lost(self.monitor.reason)
        if away > QUIET_SECONDS and self._said_at is None:
            self._said_at = time.monotonic()
            left = self.patience_s - away
            self.say(f"{self.name} does not answer ({self.monitor.reason}): waiting for it, {left:.0f} s at most")
        elif away == 0 and self._said_at is not None:
            self._said_at = None
            self.say(f"{self.name} answers again")

    def figures(self) -> dict[str, float | None]:
        """What it took since the last call: requests, those made again, those that the service put off."""
        now = (self.monitor.requests, self.monitor.retries, self.monitor.rate_limits)
        names = ("service_requests", "service_retries", "service_rate_limits")
        found = {name: float(a - b) for name, a, b in zip(names, now, self._counted, strict=True)}
        self._counted = now
        return dict(found)

    def base_model(self, names: Sequence[str], wanted: str) -> tuple[str, int | None]:
        """The first of `names` that the service has, and its longest sequence, None where it does not say.

        wanted: the model as the config has it. Raises ConfigError where there is none.
        """
        known = {model.model_name: model for model in self.models if model.model_name}
        found = next((name for name in names if name in known), None)
        if found is None:
            listed = ", ".join(sorted(known)[:10]) or "none"
            raise ConfigError(
                f'model.model = "{wanted}": {self.name} has no such model{did_you_mean(wanted, known)}; it has {listed}'
            )
        return found, getattr(known[found], "max_context_length", None)

    def download(self, path: str, folder: Path, unpack: Callable[[Path], None]) -> None:
        """Fetch the archive of saved sampler weights, tinker://RUN/..., and unpack it; `folder` is for temporary use.

        Raises ServerLost, or RetrainError where there is no such archive.
        """
        run, _, weights = path.removeprefix("tinker://").partition("/")
        url = self.call(lambda: self.client.create_rest_client().get_checkpoint_archive_url(run, weights).result()).url
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            archive = Path(temporary) / "archive"
            self.call(lambda: self._fetch(url, archive))
            unpack(archive)

    def _fetch(self, url: str, target: Path) -> None:
        # The address is signed and for this download only: it is a secret, so that errors do not name it.
        try:
            with (
                httpx2.stream("GET", url, follow_redirects=True, timeout=self.patience_s) as response,
                target.open("wb") as file,
            ):
                if response.status_code >= 300:
                    raise RetrainError(f"{self.name}: the adapter's archive: HTTP {response.status_code}")
                for chunk in response.iter_bytes():
                    file.write(chunk)
        except httpx2.HTTPError as error:
            raise self.lost(f"the adapter's archive: {type(error).__name__}") from error

    def _reason(self, error: BaseException) -> str:
        text = redact(" ".join((str(error) or type(error).__name__).split()))
        return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."

    def close(self) -> None:
        """End the session. Connections are those of the SDK's event loop, and closed on it."""
        self.client.holder.close()
        closed = asyncio.run_coroutine_threadsafe(self._http.aclose(), self.client.holder.get_loop())
        with suppress(TimeoutError):
            closed.result(CLOSE_SECONDS)


def check_requirements() -> None:
    """Raises ConfigError where SDK or key is missing; never repeats the key."""
    if importlib.util.find_spec("tinker") is None:
        raise ConfigError('backend.backend = "tinker": needs the tinker SDK: pip install "retrain[tinker]"')
    key = os.environ.get(KEY_VARIABLE, "")
    if not key and not os.environ.get(COMMAND_VARIABLE):
        raise ConfigError(
            f'backend.backend = "tinker": {KEY_VARIABLE} is not set. Set it in the environment or in .env (a server of '
            "your own may take any that begins with tml-)"
        )
    if key and not key.startswith(("tml-", "eyJ")):
        raise ConfigError(f'{KEY_VARIABLE}: is no key of a Tinker service, they begin with "tml-"')


def check_kind(url: str, kind: str) -> None:
    """Raises ConfigError where the service says that it is SkyRL's and the config takes it for another."""
    if not url.startswith("http") or kind == "skyrl":
        return
    with suppress(httpx2.HTTPError, ValueError):
        answer = httpx2.get(f"{url.rstrip('/')}/", timeout=GREETING_SECONDS).json()
        if isinstance(answer, dict) and answer.get("name") == SKYRL_NAME:
            raise ConfigError(
                f'backend.service = "{kind}": {url} is SkyRL\'s server, which reduces the loss in another way '
                f'({KINDS["skyrl"].reduction}); set backend.service = "skyrl"'
            )


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Run `work` in a thread that does not keep the process alive: a service may never answer."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="retrain-tinker").start()
    return future


def _connect(url: str, http_client: Any) -> Any:
    import tinker

    client = tinker.ServiceClient(base_url=url or None, http_client=http_client)
    _ = client.holder  # opens the session
    return client


class _Forward(logging.Handler):
    """What the SDK warns of (a queue, a rate limit, billing) becomes a line of the run."""

    def __init__(self, service: Service) -> None:
        super().__init__(logging.WARNING)
        self.service = service

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if not message.startswith(("Creating checkpoint archive", "... still running")):
            self.service.say(f"tinker: {self.service._reason(RuntimeError(message))}")


def _forward_log(service: Service) -> None:
    log = logging.getLogger("tinker")
    log.handlers = [_Forward(service)]
    log.propagate = False
