"""The entry point: dispatch, exit statuses, what is imported, and how long the light commands take."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import retrain
from retrain import cli
from retrain.cli import main
from retrain.cli.commands import COMMANDS, EVERYWHERE, TRAIN
from retrain.config import KEYS, json_schema
from retrain.types import RetrainError

ROOT = Path(__file__).parents[1]
SECONDS = 2.0
HEAVY = ("torch", "transformers", "peft", "huggingface_hub.inference")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train_with(monkeypatch: pytest.MonkeyPatch, run: Callable[[list[str]], int]) -> None:
    """Put a stand-in where the training command is."""
    module = types.ModuleType("retrain.cli.train")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "retrain.cli.train", module)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"retrain {retrain.__version__}\n"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project.get("version", retrain.__version__) == retrain.__version__


def test_public_names() -> None:
    assert set(retrain.__all__) == {
        *("Config", "ConfigError", "RetrainError", "__version__", "load_config", "train"),
        *("backpressure", "planning", "reward", "squeeze"),
    }
    assert retrain.load_config.__module__ == "retrain.config.load"
    assert retrain.ConfigError.__module__ == "retrain.types"
    assert retrain.train.__module__ == "retrain.tracking"
    assert retrain.planning.__name__ == "retrain.planning"
    assert retrain.reward.__name__ == "retrain.reward"
    assert set(retrain.__all__) <= set(dir(retrain))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = retrain.nothing


def test_help_shows_every_key_and_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    flags = re.findall(r"^  (--[\w.-]+)", text, flags=re.MULTILINE)
    assert len(flags) == len(set(flags)) == len(KEYS) + len(EVERYWHERE) + len(TRAIN.options)
    assert all(re.search(rf"^  {name} ", text, flags=re.MULTILINE) for name in COMMANDS)
    assert all(len(line) <= 120 for line in text.splitlines())
    assert main(["-h"]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: retrain {name}")


def test_dispatch_to_training(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    train_with(monkeypatch, lambda argv: seen.append(argv) or 0)
    assert main([]) == 0
    assert main(["c.toml", "--lr", "1"]) == 0
    assert seen == [[], ["c.toml", "--lr", "1"]]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (RetrainError("it broke"), 1, "error: it broke\n"),
        (retrain.ConfigError("wrong"), 2, "error: wrong\n"),
        (ValueError("odd"), 1, "error: ValueError: odd\nunexpected; --debug shows where\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_status(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(argv: list[str]) -> int:
        raise error

    train_with(monkeypatch, fail)
    assert main(["c.toml"]) == status
    assert capsys.readouterr().err == message
    assert main(["c.toml", "--debug"]) == status
    debugged = capsys.readouterr().err
    assert debugged.endswith(message)
    assert ("Traceback" in debugged) == (status != 130)


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explian"]) == 2
    assert capsys.readouterr().err == 'error: "explian": unknown command; did you mean `retrain explain`?\n'


def test_a_command_that_does_not_exist_yet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "retrain.cli.report", None)
    monkeypatch.setattr(cli, "import_module", _missing)
    assert main(["report", "logs"]) == 2
    assert capsys.readouterr().err == "error: retrain report: not available yet\n"


def _missing(name: str) -> None:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_an_import_error_inside_a_command_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "import_module", lambda name: _missing("something_else"))
    assert main(["report", "logs"]) == 1
    assert "something_else" in capsys.readouterr().err


def test_dotenv_is_loaded_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    Path(".env").write_text("RETRAIN_TEST_KEY=abc\nwrong line\n", encoding="utf-8")
    seen: list[str | None] = []
    train_with(monkeypatch, lambda argv: seen.append(os.environ.get("RETRAIN_TEST_KEY")) or 0)
    assert main([]) == 0
    assert seen == ["abc"]
    assert capsys.readouterr().err == "warning: .env:2: skipped; write NAME=value\n"


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


# ---- what is imported, in a process of its own


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


def run_python(code: str, *argv: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run code in a fresh interpreter. Returns the process and its seconds of CPU: waiting for a busy machine is not
    the command's doing."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, env=environment(), check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return process, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


RUN = f"""
import sys
from retrain.cli import main
status = main(sys.argv[1:])
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
sys.exit(status)
"""


@pytest.mark.parametrize("module", ["retrain", "retrain.config", "retrain.types", "retrain.cli", "retrain.estimate"])
def test_import_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; assert not [name for name in {HEAVY!r} if name in sys.modules]"
    process, seconds = run_python(code)
    assert process.returncode == 0, process.stderr
    assert seconds < SECONDS


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["explain", str(ROOT / "retrain/templates/quickstart.toml")],
        ["explain", str(ROOT / "retrain/templates/gpu.toml"), "--json"],
        ["explain", str(ROOT / "retrain/templates/campaign.toml")],
        ["schema"],
        ["eval", "--help"],
    ],
    ids=" ".join,
)
def test_light_command(argv: list[str]) -> None:
    process, seconds = run_python(RUN, *argv)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert len(process.stdout) > 10
    assert seconds < SECONDS


def test_init_is_light(tmp_path: Path) -> None:
    process, seconds = run_python(RUN, "init", str(tmp_path / "first.toml"))
    assert process.returncode == 0 or "exists already" in process.stderr
    assert seconds < SECONDS


@pytest.mark.parametrize("argv", [["--batch-sise", "3"], ["nothing.toml"], ["--lr", "x"], []], ids=" ".join)
def test_wrong_usage_is_said_without_torch_or_traceback(argv: list[str], tmp_path: Path) -> None:
    process, seconds = run_python(RUN, *argv)
    assert process.returncode == 2
    assert process.stderr.startswith("error: ")
    assert "Traceback" not in process.stderr
    assert process.stdout == ""
    assert list(tmp_path.iterdir()) == []
    assert seconds < SECONDS


def test_a_closed_pipe_is_no_traceback() -> None:
    # The help is longer than a pipe's buffer would be if `head` read on: the reader closes after one line.
    command = (
        f"{sys.executable} -c 'import sys; from retrain.cli import main; sys.exit(main([\"schema\"]))' | head -n 1"
    )
    process = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment(), check=True, timeout=30
    )
    assert process.stdout == "{\n"
    assert process.stderr == ""


def test_python_dash_m() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "retrain", "--version"], capture_output=True, text=True, env=environment(), check=True
    )
    assert process.stdout == f"retrain {retrain.__version__}\n"
