"""One server for all tests of this folder."""

from __future__ import annotations

import pytest
import tinker_rig


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with tinker_rig.serving(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture
def proxy(server):
    between = tinker_rig.Proxy(server)
    yield between
    between.shutdown()
    between.server_close()


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", tinker_rig.KEY)
