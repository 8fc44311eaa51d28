"""The door to the SDK: what is missing, who does not answer, and how a wait ends. The real SDK against a server that
speaks the four routes of a beginning, as SkyRL's does; the whole conversation is tested in tests/tinker."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from retrain.backend.tinker.service import Service, check_requirements
from retrain.backend.tinker.transport import Monitor, Watched
from retrain.cli import main
from retrain.config import build
from retrain.inference.tinker import TinkerEngine
from retrain.types import ConfigError, RetrainError, ServerLost
from runs import retrain, write_config

KEY = "tml-a-secret-key"
ROUTES = {
    "/api/v1/client/config": {"pjwt_auth_enabled": False},
    "/api/v1/create_session": {"type": "create_session", "session_id": "s1"},
    "/api/v1/healthz": {"status": "ok"},
    "/api/v1/session_heartbeat": {"type": "session_heartbeat"},
    "/api/v1/get_server_capabilities": {"supported_models": [{"model_name": "org/known", "max_context_length": 64}]},
}


class Greeter(ThreadingHTTPServer):
    """Answers ROUTES, everything else with 404; `status`: every answer's status, 200 by default."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.root, self.keys = 200, {}, set()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Greeter

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.do_GET()

    def do_GET(self):
        self.server.keys.add(self.headers.get("X-API-Key"))
        known = ROUTES | {"/": self.server.root}
        status = self.server.status if self.path in known else 404
        body = json.dumps(known.get(self.path, {}) if status == 200 else {"detail": f"key {KEY}: no"}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def greeter(monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    server = Greeter()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def connect():
    opened = []

    def open_service(url, say=lambda line: None, **keys):
        section = build({}, overrides={f"backend.{key}": value for key, value in keys.items()}).backend
        opened.append(Service(url, section, say))
        return opened[-1]

    yield open_service
    for service in opened:
        service.close()


def test_a_session_is_opened(greeter, connect):
    service = connect(greeter.url)
    assert service.base_model(("builtin:x", "org/known"), "builtin:x") == ("org/known", 64)
    assert greeter.keys - {None} == {KEY}
    figures = service.figures()
    assert figures["service_requests"] >= 3
    assert figures["service_retries"] == figures["service_rate_limits"] == 0
    assert service.figures()["service_requests"] == 0


def test_a_model_that_the_service_does_not_have(greeter, connect):
    service = connect(greeter.url)
    message = r'model\.model = "org/knwon": .* has no such model.*did you mean "org/known".*it has org/known'
    with pytest.raises(ConfigError, match=message):
        service.base_model(("org/knwon",), "org/knwon")


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_not_accepted(greeter, connect, status):
    greeter.status = status
    with pytest.raises(ConfigError, match=r"does not accept the key in TINKER_API_KEY .* \.env") as caught:
        connect(greeter.url)
    assert KEY not in str(caught.value)


def test_a_service_that_answers_503(greeter, connect):
    greeter.status = 503
    said = []
    with pytest.raises(ConfigError, match=r"gives no usable answer: HTTP 503 \(backend\.patience_s = 4\)"):
        connect(greeter.url, said.append, patience_s=4.0)
    assert len(said) == 1
    assert "does not answer (HTTP 503): waiting for it" in said[0]


def test_nobody_answers(monkeypatch, connect):
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    with pytest.raises(ConfigError, match=r"model\.base_url: http://127\.0\.0\.1:9 gives no usable answer"):
        connect("http://127.0.0.1:9", patience_s=0.5)


def test_who_is_no_tinker_service(greeter, connect):
    greeter.status = 404
    with pytest.raises(ConfigError, match=r"refuses a request: .*404"):
        connect(greeter.url)


def test_skyrl_taken_for_another(greeter, connect):
    greeter.root = {"name": "Tinker API Mock"}
    with pytest.raises(ConfigError, match=r'backend\.service = "tinker": .*set backend\.service = "skyrl"'):
        connect(greeter.url)
    connect(greeter.url, service="skyrl")


@pytest.mark.parametrize(
    ("key", "message"), [("", r"TINKER_API_KEY is not set.*\.env"), ("sk-wrong-kind", r'they begin with "tml-"')]
)
def test_without_a_key(monkeypatch, key, message):
    monkeypatch.setenv("TINKER_API_KEY", key)
    monkeypatch.delenv("TINKER_CREDENTIAL_CMD", raising=False)
    with pytest.raises(ConfigError, match=message) as caught:
        check_requirements()
    assert "sk-wrong-kind" not in str(caught.value)


def test_without_the_sdk(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "retrain\[tinker\]"'):
        check_requirements()


def test_the_command_refuses_before_anything_is_written(greeter, tmp_path):
    flags = ["--backend", "tinker", "--base-url", greeter.url, "--lora-dropout", 0, "--patience-s", 5]
    done = retrain(write_config(tmp_path, tmp_path / "run"), *flags)
    assert done.returncode == 2, done.stderr
    assert 'model.model = "builtin:tiny"' in done.stderr
    assert "org/known" in done.stderr
    assert "Traceback" not in done.stderr
    assert KEY not in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()


def doctor(capsys, url, tmp_path):
    config = tmp_path / "c.toml"
    config.write_text(
        f'[backend]\nbackend = "tinker"\n[model]\nmodel = "builtin:tiny"\nbase_url = "{url}"\n'
        '[training]\ntemperature = 1.0\n[data]\nsource = "arithmetic"\n'
    )
    main(["doctor", str(config), "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert not [finding for finding in findings if finding["subject"] in ("device", "kernels")]
    return next(finding for finding in findings if finding["subject"] == "service")


def test_doctor(greeter, monkeypatch, capsys, tmp_path):
    assert doctor(capsys, greeter.url, tmp_path)["level"] == "ok"
    gone = doctor(capsys, "http://127.0.0.1:9", tmp_path)
    assert gone["level"] == "fail"
    assert "does not answer" in gone["detail"]
    monkeypatch.delenv("TINKER_API_KEY")
    assert "TINKER_API_KEY is not set" in doctor(capsys, greeter.url, tmp_path)["detail"]


def future_of(value):
    future = Future()
    future.set_result(value)
    return future


def test_so_many_at_once_and_no_more(greeter, connect):
    service = connect(greeter.url)
    under_way, most, lock = 0, 0, threading.Lock()

    def call(i):
        nonlocal under_way, most
        future = Future()
        with lock:
            under_way += 1
            most = max(most, under_way)

        def finish():
            nonlocal under_way
            with lock:
                under_way -= 1
            future.set_result(i)

        # Later ones finish first: the order of results is that of the calls.
        threading.Timer(0.05 + 0.01 * (10 - i), finish).start()
        return future

    assert service.gather([lambda i=i: call(i) for i in range(10)], at_once=3) == list(range(10))
    assert most == 3
    assert service.gather([], at_once=3) == []


def test_the_first_failure_cancels_the_rest(greeter, connect):
    service = connect(greeter.url)
    broken, pending = Future(), Future()
    broken.set_exception(ValueError("Error retrieving result: no room"))
    with pytest.raises(RetrainError, match="refuses a request: Error retrieving result: no room"):
        service.gather([lambda: pending, lambda: broken, lambda: future_of(1)], at_once=2)
    assert pending.cancelled()


def test_a_wait_ends_when_the_service_is_gone(greeter, connect):
    service = connect(greeter.url, patience_s=0.3)
    service.monitor.failed("/api/v1/retrieve_future", "HTTP 502")
    began = time.monotonic()
    with pytest.raises(ServerLost, match=r"HTTP 502 \(backend\.patience_s = 0\.3\).*resume the run"):
        service.wait(Future())
    assert time.monotonic() - began < 30


def test_what_is_there_already_is_not_lost(greeter, connect):
    service = connect(greeter.url, patience_s=0.1)
    service.monitor.failed("/api/v1/retrieve_future", "HTTP 502")
    time.sleep(0.2)
    assert service.wait(future_of(7)) == 7


def test_an_outage_that_ends_is_said(greeter, connect, monkeypatch):
    monkeypatch.setattr("retrain.backend.tinker.service.QUIET_SECONDS", 0.1)
    said = []
    service = connect(greeter.url, said.append)
    service.monitor.failed("/api/v1/asample", "HTTP 502")
    future = Future()
    threading.Timer(1.0, lambda: service.monitor.answered("/api/v1/asample")).start()
    threading.Timer(1.6, lambda: future.set_result(1)).start()
    assert service.wait(future) == 1
    assert len(said) == 2
    assert "does not answer (HTTP 502): waiting for it" in said[0]
    assert said[1].endswith("answers again")


def ask(monitor, path, answer):
    """One request to a transport that answers `answer`: a status, or an error."""

    def respond(request):
        if isinstance(answer, int):
            return httpx.Response(answer)
        raise answer

    async def send():
        async with httpx.AsyncClient(transport=Watched(httpx.MockTransport(respond), monitor)) as client:
            await client.post(f"http://service{path}")

    try:
        asyncio.run(send())
    except httpx.TransportError:
        assert not isinstance(answer, int)


def test_what_the_transport_tells():
    monitor = Monitor()
    ask(monitor, "/api/v1/asample", 200)
    assert (monitor.requests, monitor.retries, monitor.failing_for()) == (1, 0, 0.0)
    ask(monitor, "/api/v1/asample", 429)
    assert (monitor.retries, monitor.rate_limits, monitor.failing_for()) == (1, 1, 0.0)
    # A result that is long in coming is no failure: it is waited for in this way.
    ask(monitor, "/api/v1/retrieve_future", httpx.ReadTimeout("slow"))
    ask(monitor, "/api/v1/retrieve_future", 408)
    assert (monitor.retries, monitor.failing_for()) == (1, 0.0)
    ask(monitor, "/api/v1/retrieve_future", 503)
    assert monitor.reason == "HTTP 503"
    assert monitor.failing_for() > 0
    # A heartbeat proves that somebody is there, not that work is done.
    ask(monitor, "/api/v1/session_heartbeat", 200)
    assert monitor.failing_for() > 0
    ask(monitor, "/api/v1/asample", 200)
    assert monitor.failing_for() == 0
    ask(monitor, "/api/v1/session_heartbeat", httpx.ConnectError("refused"))
    assert (monitor.reason, monitor.retries) == ("refused", 3)
    assert monitor.failing_for() > 0
    ask(monitor, "/api/v1/session_heartbeat", 200)
    assert monitor.failing_for() == 0


def sequence(tokens, logprobs, reason="length"):
    return SimpleNamespace(tokens=tokens, logprobs=logprobs, stop_reason=reason)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([sequence([4, 5], [-1.0, -2.0])], "returned 1 completions, 2 were asked for"),
        ([sequence([4, 5], [-1.0])] * 2, "1 log-probs came with 2 tokens"),
        ([sequence([4, 5], None)] * 2, "0 log-probs came with 2 tokens"),
        ([sequence([], [])] * 2, "the completion is empty"),
        ([sequence([4, 99], [-1.0, -2.0])] * 2, "token id 99 is not in the vocabulary"),
        ([sequence([4, 5], [-1.0, float("nan")])] * 2, "no log-probability"),
        ([sequence([4], [-1.0])] * 2, "cut after 1 of 2 tokens"),
    ],
)
def test_completions_that_cannot_have_been_asked_for(found, message):
    service = SimpleNamespace(name="it", gather=lambda calls, at_once: [SimpleNamespace(sequences=found)])
    config = build({}, overrides={"training.temperature": 1.0, "backend.backend": "tinker"})
    backend = SimpleNamespace(
        service=service, config=config, eos_ids=(1,), vocab_size=50, open_base_sampler=SimpleNamespace
    )
    backend.open_base_sampler = lambda: SimpleNamespace(sample=print)
    engine = TinkerEngine(backend)
    with pytest.raises(RetrainError, match=message):
        engine.generate([np.array([3])], np.zeros((1, 2), dtype=np.uint64), max_tokens=2, temperature=1.0)
