"""Fixtures of the tests of server engines, as a pytest plug-in: doubles, and engines on them."""

from __future__ import annotations

import pytest

from fake_server import FakeServer
from retrain import http as retrain_http
from retrain.config import InferenceConfig
from retrain.inference import Serving, fleet, open_engine, replicas, session
from server_rig import TEMPERATURE


@pytest.fixture
def impatient(monkeypatch):
    """Delays and polls a hundredth of what they are."""
    monkeypatch.setattr(retrain_http, "FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(session, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(session, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(fleet, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(replicas, "TICK_SECONDS", 0.05)


@pytest.fixture
def serve(model_folder):
    servers = []

    def start(form="vllm", kind="qwen3", **settings):
        servers.append(FakeServer(model_folder(kind), form, **settings))
        return servers[-1]

    yield start
    for each in servers:
        each.stop()


@pytest.fixture
def connect(open_local, tmp_path, impatient):
    """(engine, backend) on these servers; the engine's messages are in engine.said."""
    engines = []

    def open_(*servers, engine=None, stir=True, temperature=TEMPERATURE, max_tokens=16, rank=4, **keys):
        backend = open_local(stir=stir, model__lora_rank=rank, training__lr=1e-3, training__temperature=temperature)
        url = keys.pop("url", ",".join(each.url for each in servers))
        settings = {"request_timeout_s": 10.0, "retries": 2} | keys
        section = InferenceConfig(engine=engine or servers[0].form, url=url, **settings)
        said = []
        model = backend.policy.peft.peft_config["default"].base_model_name_or_path
        serving = Serving(model, str(tmp_path / "adapters"), temperature, max_tokens, said.append)
        opened = open_engine(section, backend, serving)
        opened.said = said
        engines.append(opened)
        return opened, backend

    yield open_
    for each in engines:
        each.close()
