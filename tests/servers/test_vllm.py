"""The engine against a real vLLM server on the CPU, started by `retrain serve`: `make test-servers`."""

from __future__ import annotations

import socket

import pytest
from rig import REPOSITORY, Background, free_port, retrain, rows, serving, wait_for

PROGRAM = REPOSITORY / ".venv-vllm" / "bin" / "vllm"
STEP_SECONDS = 300

pytestmark = [pytest.mark.servers, pytest.mark.timeout(1500)]

RUN = """
[model]
model = "builtin:tiny"
lora_rank = 8
[backend]
devices = "cpu"
adapter_path = "{folder}/adapters"
[inference]
engine = "vllm"
url = "http://127.0.0.1:{port}"
request_timeout_s = {patience}
[algorithm]
advantage_mode = "grpo"
transform_mode = "gtpo"
[training]
seed = 3
max_steps = {steps}
batch_size = 4
group_size = 8
max_tokens = 24
lr = 1e-3
save_every = 50
[data]
source = "arithmetic"
[logging]
log_dir = "{folder}/run"
"""


@pytest.fixture
def config(tmp_path):
    def write(*, steps, patience=60):
        path = tmp_path / "config.toml"
        path.write_text(RUN.format(folder=tmp_path, port=free_port(), steps=steps, patience=patience))
        return path

    return write


def assert_served_what_trains(steps):
    """Each step was sampled from the version that the step before had made, and both sides agree about it."""
    assert [row["policy_version"] for row in steps] == list(range(1, len(steps) + 1))
    assert max(row["logprob_gap_max"] for row in steps) < 1e-3


def test_a_run_learns_as_in_process(tmp_path):
    """The quickstart, 20 steps: once against the server that `retrain serve --train` starts, once in process."""
    port = free_port()
    flags = ["--max-steps", 20, "--seed", 1]
    served = retrain(
        "serve", "configs/quickstart.toml", "--train", "--program", PROGRAM, *flags, "--log-dir", tmp_path / "served",
        "--engine", "vllm", "--url", f"http://127.0.0.1:{port}", "--backend-adapter-path", tmp_path / "adapters",
    )  # fmt: skip
    assert served.returncode == 0, served.stderr[-3000:]
    own = retrain("configs/quickstart.toml", *flags, "--log-dir", tmp_path / "own")
    assert own.returncode == 0, own.stderr
    curves = {}
    for name in ("served", "own"):
        steps = rows(tmp_path / name)
        assert_served_what_trains(steps)
        curves[name] = [row["correct_rate"] for row in steps]
        print(name, " ".join(f"{rate:.2f}" for rate in curves[name]))
        first, last = sum(curves[name][:5]) / 5, sum(curves[name][-5:]) / 5
        assert last > first + 0.15, (name, first, last)
    # 128 completions a step: a rate of 0.5 has a standard error of 0.044, five steps of 0.02, and paths part.
    assert abs(sum(curves["served"][-5:]) - sum(curves["own"][-5:])) / 5 < 0.15
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the server outlived the run"


def test_a_server_that_is_killed_and_restarted(config, tmp_path):
    path, log_dir = config(steps=6, patience=90), tmp_path / "run"
    with serving(path, tmp_path / "server1.log", PROGRAM) as server:
        run = Background(tmp_path / "run.log", path)
        wait_for(lambda: len(rows(log_dir)) >= 2, STEP_SECONDS, "step 2")
        server.stop()
    # The run waits; a fresh server knows none of its adapters.
    with serving(path, tmp_path / "server2.log", PROGRAM) as server:
        wait_for(lambda: len(rows(log_dir)) >= 4 or run.process.poll() is not None, STEP_SECONDS, "step 4")
        assert run.process.poll() is None, run.log.read_text()[-3000:]
        server.stop()
    assert run.process.wait(300) == 1
    message = run.log.read_text()
    assert "--resume" in message, message[-3000:]
    done = len(rows(log_dir))
    assert (log_dir / "checkpoints" / f"step_{done:06d}").is_dir() or any(
        str(done) in entry.name for entry in (log_dir / "checkpoints").iterdir()
    ), message[-3000:]
    with serving(path, tmp_path / "server3.log", PROGRAM):
        resumed = retrain(path, "--resume", log_dir)
        assert resumed.returncode == 0, resumed.stderr
    assert len(rows(log_dir)) == 6
    assert_served_what_trains(rows(log_dir))


def test_one_of_two_replicas_is_killed(config, tmp_path):
    """Its return is tests/scale/test_replicas.py's: beside one that samples, a second vLLM does not come up on two
    cores within minutes."""
    path, log_dir = config(steps=200), tmp_path / "run"
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]

    def replica(index, log):
        return serving(path, tmp_path / log, PROGRAM, "--url", urls[index])

    with replica(0, "there.log"):
        with replica(1, "killed.log"):
            run = Background(tmp_path / "run.log", path, "--url", ",".join(urls))
            wait_for(lambda: run.process.poll() is not None or len(rows(log_dir)) >= 2, STEP_SECONDS, "step 2")
        # The second one is gone.
        wait_for(lambda: run.said(f"{urls[1]} is dropped after"), STEP_SECONDS, "the drop")
        alone = len(rows(log_dir))
        wait_for(lambda: run.process.poll() is not None or len(rows(log_dir)) >= alone + 3, STEP_SECONDS, "three")
        run.stop()
    assert run.process.returncode == 130, run.log.read_text()[-3000:]
    assert_served_what_trains(rows(log_dir))
    assert "completions served: " in run.log.read_text()
    assert [row["servers_alive"] for row in rows(log_dir)][-2:] == [1, 1]


def test_a_pretrained_model(tmp_path):
    done = retrain(
        "serve", "configs/smollm2.toml", "--train", "--program", PROGRAM, "--engine", "vllm",
        "--url", f"http://127.0.0.1:{free_port()}", "--backend-adapter-path", tmp_path / "adapters",
        "--max-prompt-tokens", 400,
        "--max-steps", 2, "--batch-size", 2, "--group-size", 4, "--no-skip-uniform-groups", "--entropy-coef", 0.01,
        "--log-dir", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert_served_what_trains(rows(tmp_path / "run"))


def test_a_rank_above_the_servers_limit(config, tmp_path):
    path = config(steps=1)
    with serving(path, tmp_path / "server.log", PROGRAM):
        done = retrain(path, "--lora-rank", 64)
    assert done.returncode in (1, 2)
    assert "rank" in done.stderr
    assert not rows(tmp_path / "run")
