"""Requests to servers: what a failure is taken for, how long the next attempt waits, and an event loop that a signal
leaves clean."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain import http
from retrain.http import BadAnswer, Broken, Busy, Call, Failure, Refused, delay_before, open_client, run, send


@pytest.fixture
def answering():
    """Starts a server that answers every request with these bytes, and nothing more."""
    servers = []

    def start(status, body, headers=()):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self.send_response(status)
                for key, value in headers:
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def get(url, call=None, *, timeout_s=5.0, key=""):
    async def main():
        async with open_client(key) as client:
            return await send(client, url, call or Call("/x"), timeout_s=timeout_s)

    return run(main)


# ---- one attempt ----------------------------------------------------------------------------------------------------


def test_json_and_text(answering):
    assert get(answering(200, b'{"a": [1]}')) == {"a": [1]}
    assert get(answering(200, b"Success: loaded"), Call("/x", {}, json=False)) == "Success: loaded"


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 529])
def test_a_server_that_has_no_answer_now_is_busy(answering, status):
    with pytest.raises(Busy, match=f"HTTP {status}: too much"):
        get(answering(status, b'{"error": {"message": "too much"}}'))


@pytest.mark.parametrize("status", [307, 400, 401, 404, 422])
def test_a_refusal_is_final(answering, status):
    with pytest.raises(Refused, match=f"HTTP {status}: no") as caught:
        get(answering(status, b"no"))
    assert caught.value.status == status


@pytest.mark.parametrize(
    "body, reason",
    [
        (b'{"error": {"message": "m"}}', "m"),
        (b'{"error": "m"}', "m"),
        (b'{"success": false, "error_message": "m"}', "m"),
        (b'{"detail": "m"}', "m"),
        (b'{"detail": [{"loc": ["body"]}]}', '[{"loc": ["body"]}]'),
        (b"<html>  a\n b</html>", "<html> a b</html>"),
        (b"", "Bad Request"),
        (b"x" * 1000, "x" * 300 + "..."),
    ],
)
def test_the_reason_is_found_where_servers_put_it(answering, body, reason):
    with pytest.raises(Refused) as caught:
        get(answering(400, body))
    assert str(caught.value) == f"HTTP 400: {reason}"


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"a": ', b"\xff\xfe\x00"])
def test_an_answer_that_is_no_json_is_bad(answering, body):
    with pytest.raises(BadAnswer, match="not JSON"):
        get(answering(200, body))


def test_nobody_there():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        with pytest.raises(Broken):
            get(f"http://127.0.0.1:{held.getsockname()[1]}")


def test_an_answer_that_does_not_come_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(Broken, match=r"no answer within 0\.2 s"):
            get(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)
        assert time.monotonic() - began < 2


def test_an_answer_that_breaks_off(answering):
    with pytest.raises(Broken):
        get(answering(200, b'{"a"', [("Content-Length", "100")]))


def test_the_key_goes_along():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                heard.append(connection.recv(4096))
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

        heard = []
        thread = threading.Thread(target=serve)
        thread.start()
        assert get(f"http://127.0.0.1:{server.getsockname()[1]}", key="secret") == {}
        thread.join()
    assert b"authorization: bearer secret" in heard[0].lower()


# ---- waiting --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.floats(0.1, 1e4))
def test_delays_double_with_jitter_up_to_a_limit(attempt, longest):
    full = min(http.FIRST_DELAY_SECONDS * 2**attempt, http.LONGEST_DELAY_SECONDS, longest)
    assert full / 2 <= delay_before(attempt, Failure("x"), longest_s=longest) <= full


def test_delays_leave_the_random_numbers_of_the_run_alone():
    random.seed(5)
    expected = random.random()
    random.seed(5)
    delay_before(0, Failure("x"), longest_s=9)
    assert random.random() == expected


@pytest.mark.parametrize("header, seconds", [("7", 7), ("0.5", 0.5), ("-3", 0), ("1e9", 100), ("nan", 0)])
def test_retry_after_in_seconds_is_honoured(answering, header, seconds):
    with pytest.raises(Busy) as caught:
        get(answering(503, b"", [("Retry-After", header)]))
    assert delay_before(0, caught.value, longest_s=100) == seconds


def test_retry_after_as_a_date_is_honoured(answering):
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    with pytest.raises(Busy) as caught:
        get(answering(503, b"", [("Retry-After", later)]))
    assert 28 <= delay_before(0, caught.value, longest_s=100) <= 30


@pytest.mark.parametrize("header", ["soon", "", "Wed, 99 Foo"])
def test_retry_after_that_says_nothing(answering, header):
    with pytest.raises(Busy) as caught:
        get(answering(503, b"", [("Retry-After", header)]))
    assert caught.value.retry_after is None


# ---- the event loop -------------------------------------------------------------------------------------------------


class Signalled(KeyboardInterrupt):
    pass


@pytest.fixture
def signalled():
    """SIGALRM raises Signalled in the main thread, as the loop's handler of SIGINT does."""

    def handler(number, frame):
        raise Signalled

    before = signal.signal(signal.SIGALRM, handler)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_together_keeps_the_order():
    async def one(i):
        await asyncio.sleep(0.01 * (3 - i))
        return i

    assert run(lambda: http.together(one(i) for i in range(4))) == [0, 1, 2, 3]


def test_the_first_failure_cancels_the_others_and_is_raised_itself():
    ended = []

    async def failing():
        await asyncio.sleep(0.01)
        raise Busy("first")

    async def waiting():
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(True)

    with pytest.raises(Busy, match="first"):
        run(lambda: http.together([waiting(), failing(), http.together([waiting()])]))
    assert ended == [True, True]


def test_a_signal_gets_through_at_once_and_leaves_nothing(signalled, capfd):
    """Warnings are errors here: a task or socket that is left over would fail the test."""
    ended = []

    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"

        async def work():
            async with open_client() as client:
                try:
                    await http.together(send(client, url, Call("/x"), timeout_s=30) for _ in range(32))
                finally:
                    ended.append(len(asyncio.all_tasks()))

        signalled(0.3)
        began = time.monotonic()
        with pytest.raises(Signalled):
            run(work)
        assert time.monotonic() - began < 2
    assert ended == [1]
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("retrain-http")]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("seconds", [0.02, 0.05, 0.1])
def test_the_next_call_works_after_a_signal(signalled, seconds):
    with pytest.raises(Signalled):
        signalled(seconds)
        run(lambda: asyncio.sleep(30))
    assert run(lambda: asyncio.sleep(0, "works")) == "works"


def test_runs_outside_the_main_thread():
    got = []
    thread = threading.Thread(target=lambda: got.append(run(lambda: asyncio.sleep(0.01, os.getpid()))))
    thread.start()
    thread.join()
    assert got == [os.getpid()]
