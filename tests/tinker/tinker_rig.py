"""A real Tinker-compatible server on the CPU, and a proxy in front of it that fails on request."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

REPOSITORY = Path(__file__).parents[2]
PROGRAM = REPOSITORY / ".venv-tinker" / "bin" / "tinker-server"
MODEL = REPOSITORY / "retrain" / "assets" / "tiny"
KEY = "tml-a-key-of-the-tests"
START_SECONDS = 180
PASSED_ON = ("content-type", "location")
# Sequences go through the model so many at a time: any other number would be compiled anew.
ROWS = 8
BACKEND = f'{{"max_lora_adapters": 16, "max_lora_rank": 8, "train_micro_batch_size": {ROWS}, \
"sample_max_num_sequences": 32}}'


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(folder):
    """The address of a server of `builtin:tiny`."""
    port = free_port()
    options = {
        "--base-model": MODEL,
        "--host": "127.0.0.1",
        "--port": port,
        "--checkpoints-base": folder / "checkpoints",
        "--database-url": f"sqlite:///{folder}/tinker.db",
        "--backend-config": BACKEND,
    }
    threads = {
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(word) for pair in options.items() for word in pair]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [PROGRAM, *command], stdout=log, stderr=log, env={**os.environ, **threads}, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _await(url, server, folder / "server.log")
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def _await(url, server, log):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(f"{url}/api/v1/healthz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError(f"the server did not start: {log.read_text()[-3000:]}")


class Proxy(ThreadingHTTPServer):
    """Passes everything on to a server, except where `fault` gives a status for a path."""

    daemon_threads = True

    def __init__(self, target):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.fault = target.removeprefix("http://"), lambda path: None
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def fail_once(self, part, status):
        """The next request to a path that holds `part` gets `status`."""
        left = [status]
        self.fault = lambda path: left.pop() if left and part in path else None


class _Handler(BaseHTTPRequestHandler):
    server: Proxy

    def _pass(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status = self.server.fault(self.path)
        if status is not None:
            return self._answer(status, b'{"detail": "a fault of the test"}', {"Content-Type": "application/json"})
        with closing(http.client.HTTPConnection(self.server.target, timeout=120)) as connection:
            connection.request(self.command, self.path, body or None, dict(self.headers))
            response = connection.getresponse()
            kept = {name: value for name, value in response.getheaders() if name.lower() in PASSED_ON}
            return self._answer(response.status, response.read(), kept)

    do_GET = do_POST = _pass

    def _answer(self, status, body, headers):
        try:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # whoever asked has gone

    def log_message(self, *arguments):
        pass
