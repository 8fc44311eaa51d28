"""`retrain serve CONFIG`: start the server that a config samples from, and stop it at the end."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

from retrain.cli.flags import parse
from retrain.cli.train import train_config
from retrain.config import Config
from retrain.config.engines import parse_urls
from retrain.inference.dialects import DIALECTS
from retrain.inference.launch import Launch, serve_command
from retrain.types import ConfigError, RetrainError

POLL_SECONDS = 0.5
STOP_SECONDS = 20.0
# Large weights take minutes to read; a server that fails ends by itself.
START_SECONDS = 1800.0
REQUEST_SECONDS = 5.0


def run(argv: Sequence[str]) -> int:
    parsed = parse(argv, "serve")
    config = parsed.load()
    launch = serve_command(config, cpu=config.backend.devices == "cpu" or shutil.which("nvidia-smi") is None)
    if parsed.options["print"]:
        settings = [f"{name}={shlex.quote(value)}" for name, value in launch.environment.items()]
        print(" ".join([*settings, shlex.join(launch.argv)]))
        return 0
    with serving(config, launch, parsed.options["program"]) as server:
        print(f"{config.inference.engine} is ready at {config.inference.url}; Ctrl-C stops it", flush=True)
        if parsed.options["train"]:
            return train_config(config)
        server.wait()
    raise RetrainError(f"{config.inference.engine} ended by itself, with exit status {server.returncode}")


@contextmanager
def serving(config: Config, launch: Launch, program: str | None) -> Iterator[subprocess.Popen[bytes]]:
    """The server, ready for requests; whatever happens inside, it and its children are gone afterwards."""
    first = program or launch.argv[0]
    found = shutil.which(first)
    if found is None:
        raise ConfigError(
            f"{first}: no such program. Install {config.inference.engine} in an environment of its own, and name its "
            "program with --program, or put it on PATH"
        )
    (url,) = parse_urls(config.inference.url, config.inference.engine)
    if _listens(url):
        raise ConfigError(f"inference.url: something answers at {url} already; stop it, or choose another port")
    environment = os.environ | launch.environment
    # A program of another environment looks for its companions there.
    environment["PATH"] = os.path.dirname(os.path.abspath(found)) + os.pathsep + environment.get("PATH", "")  # noqa: PTH100, PTH120
    # A session of its own: Ctrl-C reaches this process alone, which then stops the server and all that it started.
    server = subprocess.Popen([found, *launch.argv[1:]], env=environment, stdout=sys.stderr, start_new_session=True)
    previous = signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        _wait_until_ready(server, url + DIALECTS[config.inference.engine].health)
        yield server
    finally:
        signal.signal(signal.SIGTERM, previous)
        _stop(server)


def _as_interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt("stopped by a signal")


def _wait_until_ready(server: subprocess.Popen[bytes], health: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _answers(health):
        if server.poll() is not None:
            raise RetrainError(f"the server ended with exit status {server.returncode} before it was ready; see above")
        if time.monotonic() > deadline:
            raise RetrainError(f"the server did not answer at {health} within {START_SECONDS / 60:g} minutes")
        time.sleep(POLL_SECONDS)


def _listens(url: str) -> bool:
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname, parts.port or 80), REQUEST_SECONDS):
            return True
    except OSError:
        return False


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=REQUEST_SECONDS) as answer:
            return answer.status == 200
    except urllib.error.HTTPError as error:
        # Something is there, though not ready.
        error.close()
        return False
    except OSError:
        return False


def _stop(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            break
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue
