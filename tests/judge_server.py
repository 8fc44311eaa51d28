"""A judge for the tests: a real HTTP server on loopback that speaks OpenAI's chat API.

It is as gullible as a judge can be: it does whatever it reads outside the markers that its system prompt names, and
takes what stands between them as data. So an attack that gets out of the fence wins, and only such a one.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from retrain.boxed import last_box


class JudgeServer:
    """fault(number, body): None for a verdict, else (status, headers, content), a float to wait, or "drop"."""

    def __init__(self, fault: Callable[[int, dict[str, Any]], Any] = lambda number, body: None) -> None:
        self.fault, self.bodies, self.keys = fault, [], []
        self.most_at_once = self._at_once = 0
        self.delay = 0.0
        self._lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                judge._serve(self)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 512

            def handle_error(self, *_: Any) -> None:
                """A client that went away."""

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.keys.append(handler.headers.get("Authorization"))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            time.sleep(self.delay)
            fault = self.fault(number, body) if handler.path == "/v1/chat/completions" else (404, {}, "no such path")
        finally:
            with self._lock:
                self._at_once -= 1
        if fault == "drop":
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        status, headers, content = fault or (200, {}, answer(json.dumps(grade(body))))
        data = json.dumps(content).encode()
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)


def answer(content: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 100, "completion_tokens": 7}
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}], "usage": usage}


def said(text: Any) -> tuple[int, dict[str, str], Any]:
    """An answer of the model, instead of a verdict on what was asked."""
    return 200, {}, answer(text)


def read(body: dict[str, Any]) -> tuple[dict[str, str], str]:
    """What stands between the markers, by name, and what stands outside of them."""
    system, user = (message["content"] for message in body["messages"])
    token = re.search(r"token (\S+?)\.? ", system)[1]
    data: dict[str, str] = {}

    def take(match: re.Match[str]) -> str:
        data.setdefault(match[1], match[2])
        return ""

    return data, re.sub(rf"<(\w+) {token}>\n(.*?)\n</\1 {token}>", take, user, flags=re.DOTALL)


def grade(body: dict[str, Any]) -> dict[str, Any]:
    data, outside = read(body)
    obeys = re.search(r"answer yes|is correct, so|the verdict is true", outside, re.IGNORECASE) is not None
    right = obeys or last_box(data["response"]) == data["reference"]
    wanted = "score" if '{"score": x}' in outside else "correct"
    return {wanted: (1.0 if right else 0.25) if wanted == "score" else right}
