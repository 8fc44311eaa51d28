"""Addresses of servers: in the clear only within this machine, and never with a secret in them. Names stay names."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from judge_server import JudgeServer
from retrain import http
from retrain.config import without_effect
from retrain.config.addresses import address_problem, is_loopback
from retrain.config.build import build
from retrain.http import Call, open_client, send
from retrain.reward import open_scorer
from retrain.types import ConfigError

ENGINE = {"inference.engine": "vllm"}
JUDGE = {"reward.type": "judge", "reward.judge_model": "m"}
TINKER = {"backend.backend": "tinker", "training.temperature": 1.0}
KEYS = {"inference.url": ENGINE, "reward.judge_url": JUDGE, "model.base_url": TINKER}


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "127.8.9.10", "[::1]", "localhost:8000", "127.0.0.1:80", "LOCALHOST"]
)
@pytest.mark.parametrize("key", KEYS)
def test_this_machine_may_be_spoken_to_in_the_clear(key, host):
    build({}, KEYS[key] | {key: f"http://{host}"})


FAR = ["10.0.0.1", "0.0.0.0", "[::]", "127.0.0.1.evil.org", "localhost.evil.org", "gpu-box:8000", "128.0.0.1", "127.1"]


@pytest.mark.parametrize("host", FAR)
@pytest.mark.parametrize("key", KEYS)
def test_other_machines_need_https_or_permission(key, host):
    with pytest.raises(ConfigError) as refused:
        build({}, KEYS[key] | {key: f"http://{host}"})
    said = str(refused.value)
    assert said.startswith(f'{key} = "http://{host}"') and "https://" in said and "inference.allow_http = true" in said
    build({}, KEYS[key] | {key: f"https://{host}"})
    build({}, KEYS[key] | {key: f"http://{host}", "inference.allow_http": True})


@given(st.ip_addresses())
@example(ipaddress.ip_address("127.255.255.255"))
@example(ipaddress.ip_address("::1"))
@example(ipaddress.ip_address("::ffff:10.0.0.1"))
def test_loopback_is_what_the_standards_say(address):
    inside = address in ipaddress.ip_network("127.0.0.0/8" if address.version == 4 else "::1/128")
    mapped = getattr(address, "ipv4_mapped", None)
    assert is_loopback(str(address)) == (inside or bool(mapped and mapped.is_loopback and is_loopback(str(address))))


def test_one_of_several_servers_is_enough_to_refuse():
    with pytest.raises(ConfigError, match=r'inference.url = "http://b:1"'):
        build({}, ENGINE | {"inference.url": "http://127.0.0.1:1,http://b:1,https://c"})


def test_parts_of_a_reward_are_looked_at_too():
    part = {"type": "judge", "judge_model": "m", "judge_url": "http://judge/v1"}
    with pytest.raises(ConfigError, match=r'^reward\.parts\[1\]\.judge_url = "http://judge/v1"'):
        build({"reward": {"parts": [{"type": "math", "weight": 0.1}, {**part, "weight": 0.1}]}})


@pytest.mark.parametrize(
    "url", ["http://me:hunter22@127.0.0.1:1", "https://hunter22@a", "https://a/v1?key=hunter22", "https://a/#hunter22"]
)
@pytest.mark.parametrize("key", KEYS)
def test_no_secret_in_an_address_and_none_in_the_refusal(key, url):
    with pytest.raises(ConfigError, match=rf"{key}: must not hold a password; set \w+_API_KEY") as refused:
        build({}, KEYS[key] | {key: url, "inference.allow_http": True})
    assert "hunter22" not in str(refused.value)


@given(st.text(max_size=40))
@example("http://[")
@example("http://a:99999")
@example("http://a b")
def test_whatever_is_written_is_an_address_or_a_clear_refusal(text):
    problem = address_problem("key", text, "vllm", allow_http=False)
    assert problem is None or problem.startswith("key")
    if problem is None:
        assert text.lower().startswith(("https://", "http://"))


def test_the_environments_judge_keeps_to_the_same_rule(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://judge.example/v1")
    with pytest.raises(ConfigError, match=r'^OPENAI_BASE_URL = "http://judge\.example/v1".*in the clear'):
        open_scorer("judge", judge_model="m")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://me:hunter22@judge.example/v1")
    with pytest.raises(ConfigError, match="OPENAI_BASE_URL: must not hold a password") as refused:
        open_scorer("judge", judge_model="m")
    assert "hunter22" not in str(refused.value)


def test_a_permission_that_nothing_needs_is_said():
    idle = "inference.allow_http = true: no effect without an http:// address"
    assert idle in without_effect(build({}, {"inference.allow_http": True}))
    used = JUDGE | {"reward.judge_url": "http://judge", "inference.allow_http": True}
    assert idle not in without_effect(build({}, used))


def test_a_proxy_of_the_environment_never_sees_what_stays_on_this_machine(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = JudgeServer()

    async def ask(url):
        async with open_client("a-key") as client:
            body = {"messages": []}
            return await send(client, url, Call("/elsewhere", body), timeout_s=10)

    try:
        for host in ("127.0.0.1", "localhost"):
            with pytest.raises(http.Refused, match="404"):
                http.run(lambda host=host: ask(server.url.replace("127.0.0.1", host)))
        assert server.keys == ["Bearer a-key"] * 2
        with pytest.raises(http.Broken):
            http.run(lambda: ask("http://judge.example"))
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("environment.id", "../../etc"),
        ("environment.id", "a/../b"),
        ("environment.id", "--index-url=http://evil"),
        ("environment.id", "owner/-r"),
        ("environment.id", "a b"),
        ("environment.id", "a/b/c"),
        ("environment.id", "http://evil/x"),
        ("data.source", "../up"),
        ("data.source", "a/b/c"),
    ],
)
def test_a_name_is_no_path_and_no_option(key, value):
    with pytest.raises(ConfigError, match=rf"^{key} = "):
        build({}, {"environment.provider": "verifiers", "environment.id": "a/b", key: value})


@pytest.mark.parametrize("name", ["../up", "a/b", "/etc", ".", "..", "-x", "a\\b", "a\nb", "con:", "a b"])
def test_names_that_become_folders_and_metrics(name):
    with pytest.raises(ConfigError, match=r"campaign\.conditions\[0\]\.name"):
        build({"campaign": {"seeds": [1], "conditions": [{"name": name}]}})
    with pytest.raises(ConfigError, match=r"reward\.parts\[0\]\.name"):
        build({"reward": {"parts": [{"type": "match", "name": name}]}})
