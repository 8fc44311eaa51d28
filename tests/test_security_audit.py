"""The audit of what is installed: what it sees in an environment that is made up, and whom it asks."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import audit_dependencies as audit


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a distribution into a folder of its own, which comes first."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name, version="1.0", *lines):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        head = ("Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}")
        (folder / "METADATA").write_text("\n".join((*head, *lines)) + "\n")

    return make


def test_the_core_of_this_project():
    found, problems = audit.closure("retrain")
    assert {"retrain", "torch", "peft", "httpx2", "safetensors"} <= set(found)
    assert problems == [] and list(audit.licence_problems(found)) == []
    assert "triton" not in audit.closure("pydantic")[0]


def test_what_is_missing_or_out_of_range(install):
    install("ours", "1.0", "Requires-Dist: inner>=2", "Requires-Dist: gone", 'Requires-Dist: other; extra == "more"')
    install("inner", "1.5", "Requires-Dist: ours", "License-Expression: MIT")
    found, problems = audit.closure("ours")
    assert set(found) == {"ours", "inner"}
    assert sorted(problems) == ["ours needs gone, which is not installed", "ours needs inner>=2, installed is 1.5"]
    assert "other, which is not" in " ".join(audit.closure("ours[more]")[1]).replace('; extra == "more"', "")


def test_licences(install):
    install("free", "1.0", "License-Expression: Apache-2.0")
    install("lesser", "1.0", "Classifier: License :: OSI Approved :: GNU Lesser General Public License v3 (LGPLv3)")
    install("strict", "1.0", "Classifier: License :: OSI Approved :: GNU Affero General Public License v3")
    install("silent", "1.0")
    found = {name: audit.closure(name)[0][name] for name in ("free", "lesser", "strict", "silent")}
    problems = list(audit.licence_problems(found))
    assert [line.partition(":")[0] for line in problems] == ["strict", "silent"]


@pytest.fixture
def osv():
    """Answers as osv.dev does: one package has a flaw."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            affected = [
                {
                    "package": {"name": "holey", "ecosystem": "PyPI"},
                    "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.1"}]}],
                }
            ]
            flaw = {"id": "GHSA-1", "modified": "2026-01-01T00:00:00Z", "summary": "a hole", "affected": affected}
            data = json.dumps({"vulns": [flaw]} if asked["package"]["name"] == "holey" else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/query"
    server.shutdown()
    server.server_close()


def test_known_vulnerabilities(install, osv, tmp_path, capsys):
    pytest.importorskip("pip_audit")
    install("holey")
    install("sound")
    assert audit.vulnerabilities(osv, "--path", str(tmp_path)) == ["holey 1.0: GHSA-1, fixed in 1.1"]
    assert audit.vulnerabilities("http://127.0.0.1:9/v1/query", "--path", str(tmp_path)) is None
    assert capsys.readouterr().out.startswith("not asked: known vulnerabilities (")
