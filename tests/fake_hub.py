"""The little of the Hugging Face hub's HTTP API that `datasets` asks for, over a folder of datasets `org/name/...`."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

COMMIT = "a" * 40
REPOSITORY = r"/(?:api/)?datasets/(?P<name>[^/]+/[^/]+?)"
INFO = re.compile(REPOSITORY + r"(?:/revision/[^/]+)?")
TREE = re.compile(REPOSITORY + r"/tree/[^/]+/?(?P<path>.*)")
PATHS = re.compile(REPOSITORY + r"/paths-info/.*")
FILE = re.compile(REPOSITORY + r"/resolve/[^/]+/(?P<path>.+)")


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


class _Hub(BaseHTTPRequestHandler):
    root: Path

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = self.path.partition("?")[0]
        if match := FILE.fullmatch(url):
            path = self.root / match["name"] / match["path"]
            return self._file(path) if path.is_file() else self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        if match := TREE.fullmatch(url):
            repository = self.root / match["name"]
            return self._json([self._entry(repository, p) for p in sorted((repository / match["path"]).iterdir())])
        if (match := INFO.fullmatch(url)) and (self.root / match["name"]).is_dir():
            repository = self.root / match["name"]
            names = [{"rfilename": str(p.relative_to(repository))} for p in repository.rglob("*") if p.is_file()]
            return self._json({"id": match["name"], "sha": COMMIT, "private": False, "tags": [], "siblings": names})
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        match = PATHS.fullmatch(self.path)
        assert match
        repository = self.root / match["name"]
        self._json([self._entry(repository, repository / path) for path in asked if (repository / path).exists()])

    def _entry(self, repository: Path, path: Path) -> dict[str, object]:
        kind, oid, size = "directory", "1" * 40, 0
        if path.is_file():
            kind, oid, size = "file", _digest(path), path.stat().st_size
        return {"type": kind, "path": str(path.relative_to(repository)), "oid": oid, "size": size}

    def _file(self, path: Path) -> None:
        self._send(200, path.read_bytes(), {"ETag": f'"{_digest(path)}"', "X-Repo-Commit": COMMIT})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """The URL of a hub that holds the datasets in `root`, while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"root": root}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
