"""Secrets of the environment, planted as canaries: no byte of what a command says or writes holds one of them."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import runs
from judge_server import JudgeServer
from retrain.cli import main
from retrain.redact import MIN_LENGTH, SHOWN, redact, secrets_of, shown

CANARIES = {
    "OPENAI_API_KEY": "sk-canary-openai-0123456789",
    "VLLM_API_KEY": "canary-vllm-0123456789",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_canaryCANARYcanary",
    "HTTPS_PROXY": "http://canary-user:canary-password@127.0.0.1:9",
    "SERVICE_PASSWORD": 'can"ary \\ wörd',
}
PIECES = [*(value for name, value in CANARIES.items() if name != "HTTPS_PROXY"), "canary-user", "canary-password"]

# Foreign code, as careless as can be: its error tells all that it knows, in three spellings.
REWARD = """
import os
def score(response, reference):
    if len(response) % 2:
        return float(response.count("1") > 2)
    secrets = [value for name, value in os.environ.items() if "anary" in value or name == "WANDB_API_KEY"]
    raise ValueError(f"\\x1b[2J lost: {secrets} {' '.join(secrets)}")
"""


def leaks(content: bytes) -> list[str]:
    text = content.decode("utf-8", "replace")
    forms = {form: piece for piece in PIECES for form in (piece, json.dumps(piece)[1:-1], repr(piece)[1:-1])}
    return [piece for form, piece in forms.items() if form in text]


def assert_silent(folder: Path, *said: str) -> None:
    """Nothing that was said or written holds a canary, file names included."""
    for text in said:
        assert leaks(text.encode()) == []
    for path in folder.rglob("*"):
        assert leaks(str(path).encode()) == []
        if path.is_file() and path.name != ".env":
            assert leaks(path.read_bytes()) == [], path


@pytest.fixture
def canaries(monkeypatch):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def echoing():
    """A judge that refuses, and repeats the key that it was sent."""
    server = JudgeServer()
    server.fault = lambda number, body: (401, {}, {"error": {"message": f"wrong key: \x1b[31m{server.keys[-1]}"}})
    yield server
    server.stop()


def write_config(folder: Path, extra: str) -> Path:
    folder.mkdir(exist_ok=True)
    return runs.write_config(folder, folder / "run", extra)


def test_a_search_that_finds(tmp_path):
    for piece in PIECES:
        for text in (piece, json.dumps([piece]), repr([piece])):
            assert leaks(text.encode())
    (tmp_path / "file").write_text(CANARIES["HF_TOKEN"])
    with pytest.raises(AssertionError):
        assert_silent(tmp_path)


def test_a_run_and_its_failures_keep_them(tmp_path, monkeypatch):
    """The real command, the keys in .env: half of the rewards fail with every secret in their message."""
    tracked = 'wandb_project = "canary-project"\n' if find_spec("wandb") else ""
    config = write_config(tmp_path, '[reward]\ntype = "custom"\ncustom_module = "careless"\nmax_error_rate = 1.0\n')
    config.write_text(config.read_text().replace("[logging]\n", f"[logging]\n{tracked}"))
    (tmp_path / "careless.py").write_text(REWARD)
    quoted = {name: "'" + value + "'" for name, value in CANARIES.items()}
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in quoted.items()), encoding="utf-8")
    for name in CANARIES:
        monkeypatch.delenv(name, raising=False)
    environment = runs.environment() | {"WANDB_MODE": "offline", "PYTHONUTF8": "1"}

    command = [sys.executable, "-m", "retrain", str(config), "--max-steps", "1", "--debug"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert_silent(tmp_path, done.stdout, done.stderr)
    generations = (tmp_path / "run" / "generations.jsonl").read_text(encoding="utf-8")
    assert generations.count(SHOWN) >= len(CANARIES)
    assert (tmp_path / "run" / "wandb").is_dir() == bool(tracked)


@pytest.mark.usefixtures("canaries")
def test_a_run_that_stops_for_its_failing_rewards_keeps_them(tmp_path, capsys, monkeypatch):
    (tmp_path / "careless.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, '[reward]\ntype = "custom"\ncustom_module = "careless"\nmax_error_rate = 0.0\n')
    assert main([str(config), "--max-steps", "1", "--debug"]) == 1
    said = capsys.readouterr()
    assert "Traceback" in said.err and SHOWN in said.err
    assert "\x1b[2J" not in said.out + said.err
    assert_silent(tmp_path, said.out, said.err)


@pytest.mark.usefixtures("canaries")
def test_a_server_that_repeats_the_key(tmp_path, capsys, echoing):
    keys = f'[reward]\ntype = "judge"\njudge_model = "m"\njudge_url = "{echoing.url}"\n'
    assert main([str(write_config(tmp_path, keys)), "--debug"]) == 2
    assert echoing.keys == [f"Bearer {CANARIES['OPENAI_API_KEY']}"]
    said = capsys.readouterr()
    assert f"HTTP 401: wrong key:  [31mBearer {SHOWN}" in said.err
    assert_silent(tmp_path, said.out, said.err)
    assert not (tmp_path / "run" / "metadata.json").exists()


@pytest.mark.usefixtures("canaries")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--judge-url", "https://me:canary-password@judge/v1"], "reward.judge_url: must not hold a password"),
        (["--environment-args", json.dumps({"a": [CANARIES["HF_TOKEN"]]})], "environment.args: holds the value of $HF"),
        (["--judge-rubric", f"say {CANARIES['SERVICE_PASSWORD']}"], "reward.judge_rubric: holds the value of $SERVICE"),
        (["--log-dir", f"/tmp/{CANARIES['VLLM_API_KEY']}"], "logging.log_dir: holds the value of $VLLM_API_KEY"),
        (["--lr", CANARIES["HF_TOKEN"]], "--lr ***: must be a number"),
        ([f"--{CANARIES['HF_TOKEN']}", "1"], "unknown flag"),
        (["--engine", "vllm", "--url", "http://127.0.0.1:9"], "does not answer"),
    ],
)
def test_a_secret_on_the_command_line(tmp_path, capsys, flags, message):
    config = write_config(tmp_path, "")
    assert main([str(config), *flags, "--debug"]) == 2
    said = capsys.readouterr()
    assert "Traceback" in said.err and message in said.err
    assert_silent(tmp_path, said.out, said.err)
    assert not (tmp_path / "run" / "metadata.json").exists()


@pytest.mark.usefixtures("canaries")
@pytest.mark.parametrize("command", ["explain", "doctor", "status"])
def test_commands_that_look_on(tmp_path, capsys, command):
    subject = tmp_path if command == "status" else write_config(tmp_path, "")
    main([command, str(subject), "--json"])
    said = capsys.readouterr()
    assert said.out or said.err
    assert_silent(tmp_path, said.out, said.err)


# ---- what is taken for a secret -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["API_KEY", "OPENAI_API_KEY", "HF_TOKEN", "github_token", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "KEYS_2"]
)
def test_names_of_secrets(name):
    assert secrets_of({name: "12345678"}) == {"12345678": name}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PATH", "/usr/bin:/bin"),
        ("OPENAI_API_KEY", "EMPTY"),
        ("TOKENIZERS_PARALLELISM", "false-or-true"),
        ("SSL_KEY", "/etc/passwd"),
        ("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        ("KEYBOARD_LAYOUT", "de-latin1-nodeadkeys"),
    ],
)
def test_what_is_no_secret(name, value):
    assert secrets_of({name: value}) == {}


def test_a_secret_within_another_leaves_nothing_of_it():
    environ = {"A_KEY": "abcdefgh", "B_KEY": "abcdefgh-and-more"}
    assert redact("x abcdefgh-and-more abcdefgh y", environ) == f"x {SHOWN} {SHOWN} y"


@given(
    secret=st.text(st.characters(exclude_categories=["Cs", "Z", "Cc"]), min_size=MIN_LENGTH, max_size=30),
    around=st.tuples(st.text(max_size=5), st.text(max_size=5)),
)
def test_no_spelling_of_a_secret_is_left(secret, around):
    environ = {"A_KEY": secret}
    before, after = around
    for spelt in (secret, json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret)):
        kept = redact(f"{before}{spelt}{after}", environ)
        assert SHOWN in kept and secret not in kept.replace(SHOWN, "")
    assert redact({"a": [secret, 1, None, (secret,)]}, environ) == {"a": [SHOWN, 1, None, [SHOWN]]}


def test_numbers_that_look_like_a_secret_stay():
    row = {"loss": 0.12345678, "text": "pin 12345678"}
    assert redact(row, {"A_KEY": "12345678"}) == {"loss": 0.12345678, "text": f"pin {SHOWN}"}


def test_control_codes_are_not_shown():
    assert shown("a\x1b[2Jb\x07c\r\nd\te\u202ef\x9b") == "a [2Jb c \nd\te f "
