"""`retrain serve`: the command for each server, and a server that is started, waited for and stopped."""

from __future__ import annotations

import shlex
import signal
import stat
import sys

import pytest

import runs
from retrain.cli import main


@pytest.fixture
def printed(capsys, tmp_path):
    """The command that serve prints, in words, with flags beside the URL."""

    def of(engine, *flags):
        path = runs.write_config(tmp_path, tmp_path / "run")
        assert main(["serve", str(path), "--print", "--url", "http://127.0.0.1:8123", "--engine", engine, *flags]) == 0
        return shlex.split(capsys.readouterr().out)

    return of


def test_vllm(printed):
    words = printed("vllm")
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in words
    text = " ".join(words)
    for part in (
        "--host 127.0.0.1 --port 8123",
        "--served-model-name builtin:tiny",
        "--enable-lora",
        "--dtype float32",
    ):
        assert part in text
    assert "--max-lora-rank 8" in text  # the least that vLLM offers for rank 4
    assert "--logprobs-mode" not in text
    assert "--max-model-len" not in text


def test_vllm_follows_the_config(printed):
    flags = ["--training-temperature", "0.7", "--no-prefix-caching", "--max-prompt-tokens", "50", "--lora-rank", "33"]
    text = " ".join(printed("vllm", *flags))
    for part in (
        "--logprobs-mode processed_logprobs",
        "--no-enable-prefix-caching",
        "--max-model-len 62",
        "--max-lora-rank 64",
    ):
        assert part in text


def test_other_servers(printed):
    assert "sglang.launch_server" in printed("sglang")
    assert printed("max")[:3] == ["MAX_SERVE_HOST=127.0.0.1", "max", "serve"]
    assert printed("mlx")[0] == "mlx_lm.server"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine", "openai", "--url", "http://127.0.0.1:1"], "no server to start"),
        (["--engine", "pytorch"], "no server to start"),
        (["--engine", "vllm"], "needs inference.url"),
        (["--engine", "vllm", "--url", "http://127.0.0.1:1,http://127.0.0.1:2"], "names 2 servers"),
        (["--engine", "vllm", "--url", "http://127.0.0.1:1", "--lora-rank", "1000"], "up to rank 512"),
        (["--engine", "vllm", "--url", "http://127.0.0.1:1", "--program", "no-such-vllm"], "no such program"),
    ],
)
def test_what_cannot_be_served(capsys, tmp_path, flags, message):
    path = runs.write_config(tmp_path, tmp_path / "run")
    assert main(["serve", str(path), *flags]) == 2
    assert message in capsys.readouterr().err


def program(tmp_path, body):
    """An executable in the place of the server's."""
    path = tmp_path / "server"
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


HEALTHY = """
import sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *args):
        pass
time.sleep(1)
port = int(sys.argv[sys.argv.index("--port") + 1])
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal_and_leaves_nothing(tmp_path, unused_port, number):
    path = runs.write_config(tmp_path, tmp_path / "run")
    url = f"http://127.0.0.1:{unused_port}"
    process = runs.start("serve", path, "--engine", "vllm", "--url", url, "--program", program(tmp_path, HEALTHY))
    assert process.stdout is not None
    assert process.stdout.readline() == f"vllm is ready at {url}; Ctrl-C stops it\n"
    process.send_signal(number)
    assert process.wait(30) == 130
    again = runs.start("serve", path, "--engine", "vllm", "--url", url, "--program", program(tmp_path, HEALTHY))
    assert again.stdout is not None
    assert "is ready" in again.stdout.readline(), "the port was not free again"
    busy = runs.retrain("serve", path, "--engine", "vllm", "--url", url, "--program", program(tmp_path, HEALTHY))
    assert busy.returncode == 2
    assert "something answers" in busy.stderr
    again.send_signal(number)
    assert again.wait(30) == 130
    for stream in (process.stdout, process.stderr, again.stdout, again.stderr):
        assert stream is not None
        stream.close()


def test_a_server_that_dies(tmp_path, unused_port):
    path = runs.write_config(tmp_path, tmp_path / "run")
    url = f"http://127.0.0.1:{unused_port}"
    done = runs.retrain("serve", path, "--engine", "vllm", "--url", url, "--program", program(tmp_path, "exit(3)"))
    assert done.returncode == 1
    assert "ended with exit status 3 before it was ready" in done.stderr


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
