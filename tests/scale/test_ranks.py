"""Whole runs of several ranks: against one process, stopped and resumed, killed, and wrongly started."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from rank_runs import RanksRun, run_ranks, until
from safetensors.torch import load_file

from fake_server import FakeServer
from retrain.training.folder import METRICS
from retrain.training.metrics import MEASURED
from runs import lines, retrain, start, unmeasured, write_config

pytestmark = pytest.mark.scale

# No dropout, which differs between ranks; a rate that does not depend on where the run ends.
PLAIN = ("--lora-dropout", 0, "--lr-schedule", "constant", "--keep-checkpoints", 0)


@pytest.fixture
def config(tmp_path) -> Path:
    return write_config(tmp_path, tmp_path / "log", learns=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with a config and two runs of 20 steps from it: "one" of one process, "two" of `retrain --nproc 2`."""
    folder = tmp_path_factory.mktemp("ranks")
    config = write_config(folder, folder / "log", learns=True)
    for name, nproc in (("one", ()), ("two", ("--nproc", 2))):
        done = retrain(config, *nproc, "--log-dir", folder / name, "--max-steps", 20, *PLAIN)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        (folder / f"{name}.out").write_text(done.stdout, encoding="utf-8")
    return folder


def adapter(folder: Path) -> dict:
    return load_file(folder / "adapter_model.safetensors")


def assert_close(a: Path, b: Path) -> None:
    ours, theirs = adapter(a), adapter(b)
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5


def test_twenty_steps_are_those_of_one_process(base: Path):
    assert_close(base / "one/final", base / "two/final")
    for a, b in zip(lines(base / "one/metrics.jsonl"), lines(base / "two/metrics.jsonl"), strict=True):
        assert (a.pop("world_size"), b.pop("world_size")) == (1, 2)
        assert a.keys() == b.keys()
        for name in a.keys() - set(MEASURED):
            other = pytest.approx(b[name], rel=1e-3, abs=1e-5) if isinstance(b[name], float) else b[name]
            assert a[name] == other, name
    texts = [[row["completion"] for row in lines(base / name / "generations.jsonl")] for name in ("one", "two")]
    assert texts[0] == texts[1]


def test_one_writes_and_one_speaks(base: Path):
    one, two = ({path.relative_to(base / n) for path in (base / n).rglob("*")} for n in ("one", "two"))
    assert one == two
    assert len(lines(base / "two/metrics.jsonl")) == 20
    metadata = json.loads((base / "two/metadata.json").read_text())
    assert metadata["world_size"] == 2
    assert len(metadata["sessions"]) == 1
    said = [(base / f"{name}.out").read_text() for name in ("one", "two")]
    assert [len(text.splitlines()) for text in said] == [len(said[0].splitlines())] * 2


@pytest.mark.parametrize("size", [1, 3])
def test_a_checkpoint_of_two_goes_on_with_any_number(base: Path, tmp_path, size):
    words = [base / "config.toml", "--resume", base / "two/checkpoints/step_000010", "--log-dir", tmp_path / "fork"]
    words += ["--max-steps", 12, *PLAIN, "--batch-size", 2]
    if size == 1:
        assert retrain(*words).returncode == 0
    else:
        # Three ranks need three groups: the same run with more groups, begun anew on two.
        first = [base / "config.toml", "--log-dir", tmp_path / "wide", "--batch-size", 3, "--max-steps", 4, *PLAIN]
        assert run_ranks(tmp_path / "a", 2, *first).statuses == [0, 0]
        words = [base / "config.toml", "--resume", tmp_path / "wide/checkpoints/step_000002", "--log-dir"]
        words += [tmp_path / "fork", "--max-steps", 4, *PLAIN, "--batch-size", 3]
        assert run_ranks(tmp_path / "b", 3, *words).statuses == [0, 0, 0]
    other = base / "two/checkpoints/step_000012" if size == 1 else tmp_path / "wide/checkpoints/step_000004"
    assert_close(tmp_path / "fork/final", other)


def test_the_same_number_of_ranks_goes_on_to_the_same_bits(config: Path, tmp_path):
    """With dropout, of which each rank draws its own."""
    words = [config, "--save-every", 2, "--keep-checkpoints", 0]
    whole = run_ranks(tmp_path / "a", 2, *words, "--log-dir", tmp_path / "whole", "--max-steps", 4)
    assert whole.statuses == [0, 0], whole.said
    again = [*words, "--log-dir", tmp_path / "again", "--resume", tmp_path / "whole/checkpoints/step_000002"]
    assert run_ranks(tmp_path / "b", 2, *again, "--max-steps", 4).statuses == [0, 0]
    a, b = (tmp_path / name for name in ("whole", "again"))
    assert [unmeasured(row) for row in lines(a / "metrics.jsonl")] == [
        unmeasured(r) for r in lines(b / "metrics.jsonl")
    ]
    for name in ("final/adapter_model.safetensors", "generations.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


def has_steps(log_dir: Path, count: int = 1) -> bool:
    path = log_dir / "metrics.jsonl"
    return path.exists() and path.read_bytes().count(b"\n") >= count


def test_a_rank_that_is_killed_ends_the_run_at_once(config: Path, tmp_path):
    log_dir, killed = tmp_path / "log", []

    def kill(run: RanksRun) -> None:
        until(lambda: has_steps(log_dir))
        killed.append(time.monotonic())
        run.send(signal.SIGKILL, 1)

    words = [config, "--log-dir", log_dir, "--max-steps", 500]
    run = run_ranks(tmp_path / "run", 2, *words, meanwhile=kill)
    assert run.ended - killed[0] < 3
    assert run.statuses == [1, -signal.SIGKILL]
    assert run.said.startswith("error: the process of rank 1 died")
    assert run.said.count("\n") == 1
    assert f"retrain {log_dir / 'config.toml'} --resume {log_dir}" in run.said


def test_a_signal_to_all_ends_the_run_after_a_checkpoint(config: Path, tmp_path):
    log_dir = tmp_path / "log"

    def stop(run: RanksRun) -> None:
        until(lambda: has_steps(log_dir))
        run.send(signal.SIGINT)
        run.send(signal.SIGINT)  # as where a terminal and a launcher both send it

    words = [config, "--log-dir", log_dir, "--max-steps", 500, "--save-every", 500]
    run = run_ranks(tmp_path / "run", 2, *words, meanwhile=stop)
    assert run.statuses == [130, 130]
    steps = len(lines(log_dir / "metrics.jsonl"))
    assert json.loads((log_dir / "trainer_state.json").read_text())["step"] == steps
    assert json.loads((log_dir / "metadata.json").read_text())["sessions"][-1]["status"] == "interrupted"
    assert run.said.count("checkpoint written") == 1
    assert run.said.count("stopping at the next safe point") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_launcher(config: Path, tmp_path, number):
    log_dir = tmp_path / "log"
    words = [config, "--log-dir", log_dir, "--max-steps", 500, "--save-every", 500]
    launcher = start("--nproc", 2, *words)
    until(lambda: has_steps(log_dir))
    ranks = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    assert len(ranks) == 2
    launcher.send_signal(number)
    _, said = launcher.communicate(timeout=60)
    until(lambda: not any(alive(pid) for pid in ranks), 10)
    if number == signal.SIGTERM:
        assert launcher.returncode == 130
        assert "checkpoint written" in said
        assert json.loads((log_dir / "trainer_state.json").read_text())["step"] > 0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- what is wrong with the input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("--batch-size", 1), ("--devices", "gpu:3"), ("--lr", "x")])
def test_what_ranks_cannot_do_is_refused_before_they_start(config: Path, tmp_path, words):
    done = retrain(config, "--nproc", 2, "--log-dir", tmp_path / "log", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("words", [("--batch-size", 1), ("--lr", "x"), ("--model", "./nowhere")])
def test_what_all_ranks_refuse_is_said_once(config: Path, tmp_path, words):
    run = run_ranks(tmp_path / "run", 2, config, "--log-dir", tmp_path / "log", *words)
    assert run.statuses == [2, 2]
    assert run.said.startswith("error: ")
    assert run.said.count("\n") == 1
    assert not (tmp_path / "log").exists()


def test_other_commands_are_refused(config: Path, tmp_path):
    run = run_ranks(tmp_path / "run", 2, "eval", config)
    assert run.statuses == [2, 2]
    assert "retrain eval: runs as one process" in run.said


PLUG_IN = """
import os
from retrain.types import RetrainError

def advantages(rewards):
    if os.environ["RANK"] == "1":
        raise RetrainError("only here. Take care")
    return rewards - rewards.mean()
"""


def test_an_error_of_one_rank_alone_is_named(config: Path, tmp_path, monkeypatch):
    (tmp_path / "plug.py").write_text(PLUG_IN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    words = [config, "--log-dir", tmp_path / "log", "--advantage-mode", "plug.advantages"]
    run = run_ranks(tmp_path / "run", 2, *words)
    assert run.statuses[0] == 1
    assert "error: rank 1: " in run.said
    assert "only here. Take care" in run.said


def test_sampling_ahead_is_that_of_one_process(config: Path, tmp_path):
    for name, nproc in (("one", ()), ("two", ("--nproc", 2))):
        done = retrain(config, *nproc, "--log-dir", tmp_path / name, "--max-steps", 4, *PLAIN, "--max-staleness", 1)
        assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "one/final", tmp_path / "two/final")
    versions = [[row["sampler_version"] for row in lines(tmp_path / name / METRICS)] for name in ("one", "two")]
    assert versions[0] == versions[1]


# ---- who samples, and a sharded base -------------------------------------------------------------------------------

SQUEEZED = """
[squeeze]
at_steps = [2]
to_ranks = [2]
"""


def test_a_sharded_run_is_that_of_one_process(tmp_path):
    """With a squeeze in its course, and an evaluation."""
    squeezed = write_config(tmp_path, tmp_path / "log", SQUEEZED, learns=True)
    words = [squeezed, "--max-steps", 3, *PLAIN, "--no-merged-copy", "--eval-fraction", 0.1, "--eval-every", 2]
    words += ["--eval-examples", 3]
    one = retrain(*words, "--log-dir", tmp_path / "one", "--sharding", "fsdp")
    assert one.returncode == 0, one.stderr
    assert 'backend.sharding = "fsdp": no effect with one process' in one.stdout
    run = run_ranks(tmp_path / "run", 2, *words, "--log-dir", tmp_path / "two", "--sharding", "fsdp")
    assert run.statuses == [0, 0], run.said
    assert "sharded over 2 processes" in run.output(0, "stdout")
    assert run.output(1, "stdout") == ""
    assert_close(tmp_path / "one/final", tmp_path / "two/final")
    a, b = (json.loads((tmp_path / name / "metadata.json").read_text()) for name in ("one", "two"))
    assert (a["base_sha256"], a["parameters"]) == (b["base_sha256"], b["parameters"])
    rates = [[row["eval_correct_rate"] for row in lines(tmp_path / name / METRICS)] for name in ("one", "two")]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_servers_are_the_first_ranks(config: Path, tmp_path, model_folder, sharding):
    fake = FakeServer(model_folder("qwen3"), "vllm")
    try:
        words = [config, "--model", model_folder("qwen3"), "--engine", "vllm", "--url", fake.url]
        words += ["--backend-adapter-path", tmp_path / "adapters", "--log-dir", tmp_path / "log"]
        words += ["--sharding", sharding, "--max-steps", 2, "--max-tokens", 6, *PLAIN]
        run = run_ranks(tmp_path / "run", 2, *words)
    finally:
        fake.stop()
    assert run.statuses == [0, 0], run.said
    rows = lines(tmp_path / "log" / METRICS)
    assert len(rows) == 2
    assert max(row["logprob_gap_max"] or 0.0 for row in rows) < 1e-3
    assert not list((tmp_path / "adapters").iterdir())  # one wrote them, and took them away


def test_a_server_that_is_away_is_refused_once(config: Path, tmp_path):
    words = [config, "--engine", "vllm", "--url", "http://127.0.0.1:9", "--log-dir", tmp_path / "log"]
    run = run_ranks(tmp_path / "run", 2, *words, "--backend-adapter-path", tmp_path / "adapters")
    assert run.statuses == [2, 2]
    assert run.said.count("error: ") == 1
    assert "inference.url" in run.said
    assert not (tmp_path / "log").exists()
