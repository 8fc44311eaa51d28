"""Commands and real servers in the background: what the tests of this folder share."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
START_SECONDS = 300


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment():
    alone = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "MAX_SERVE_DISABLE_TELEMETRY": "1"}
    return {**os.environ, "OMP_NUM_THREADS": "1", **alone}


def command(*arguments):
    return [sys.executable, "-m", "retrain", *map(str, arguments)]


def retrain(*arguments, timeout=1200):
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, cwd=REPOSITORY, env=environment(), timeout=timeout
    )


def rows(log_dir):
    path = log_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.2)


class Background:
    """A command in the background, its output in a file."""

    def __init__(self, log, *arguments):
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command(*arguments), stdout=output, stderr=output, cwd=REPOSITORY, env=environment()
            )

    def said(self, text):
        assert self.process.poll() is None or text in self.log.read_text(), self.log.read_text()[-3000:]
        return text in self.log.read_text()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


@contextmanager
def serving(config, log, program, *flags):
    server = Background(log, "serve", config, "--program", program, *flags)
    try:
        wait_for(lambda: server.said("is ready at"), START_SECONDS, "the server")
        yield server
    finally:
        with suppress(ProcessLookupError):
            server.stop()
