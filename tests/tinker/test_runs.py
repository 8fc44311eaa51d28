"""Whole runs at a real Tinker-compatible server: they learn, are killed, lose the service. `make test-tinker`."""

from __future__ import annotations

import json
import signal
import time

import numpy as np
import pytest
import tinker_rig

from runs import lines, retrain, start
from tiny_models import load_with_peft

pytestmark = [pytest.mark.tinker, pytest.mark.timeout(1500)]

BATCH, GROUP, STEPS = 4, 8, 30
RUN = """
[backend]
backend = "tinker"
service = "skyrl"
patience_s = 6.0
[model]
model = "builtin:tiny"
base_url = "{url}"
lora_rank = 8
[algorithm]
advantage_mode = "grpo"
transform_mode = "gtpo_sepa"
skip_uniform_groups = false
[training]
seed = 3
max_steps = {steps}
batch_size = {batch}
group_size = {group}
max_tokens = 24
temperature = 1.0
lr = 2e-3
max_grad_norm = 0.0
save_every = 10
[sepa]
steps = 10
delay_steps = 2
[data]
source = "arithmetic"
[logging]
log_dir = "{folder}/run"
"""


@pytest.fixture
def config(tmp_path):
    def write(url, steps=STEPS):
        path = tmp_path / "config.toml"
        path.write_text(RUN.format(url=url, folder=tmp_path, steps=steps, batch=BATCH, group=GROUP))
        return path

    return write


def metrics(log_dir):
    path = log_dir / "metrics.jsonl"
    return lines(path) if path.exists() else []


def wait_for(condition, process, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1][-3000:])
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_thirty_steps_learn_though_killed(config, tmp_path, server):
    path, log_dir = config(server), tmp_path / "run"
    run = start(path)
    wait_for(lambda: len(metrics(log_dir)) >= 13, run)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    first_try = metrics(log_dir)
    state = json.loads((log_dir / "trainer_state.json").read_text())
    assert state["step"] == 10
    assert state["service"]["state"].startswith("tinker://")
    assert state["service"]["lasting"]
    done = retrain(path, "--resume", log_dir, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = metrics(log_dir)
    print(" ".join(f"{row['correct_rate']:.2f}" for row in rows))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["policy_version"] for row in rows] == list(range(1, STEPS + 1))
    # Not a prompt was asked twice, and none left out.
    asked = [row["prompt_index"] for row in lines(log_dir / "generations.jsonl")]
    assert asked == [i for i in range(STEPS * BATCH) for _ in range(GROUP)]
    # Weights and moments are those of step 10: the steps that were lost come out as they had been.
    for before, after in zip(first_try[10:13], rows[10:13], strict=True):
        for key in ("loss", "grad_norm", "mean_reward", "completion_tokens", "sepa_lambda"):
            assert after[key] == pytest.approx(before[key], abs=1e-4), key
    assert max(row["logprob_gap_max"] for row in rows) < 1e-3
    assert {row["uncertainty"] for row in rows} == {"surprisal"}
    assert {row["entropy_mean"] for row in rows} == {None}
    # None was skipped; a step whose groups are all uniform has no gradient.
    assert np.median([row["grad_norm"] for row in rows]) > 0
    early, late = (np.mean([row["correct_rate"] for row in part]) for part in (rows[:5], rows[-5:]))
    assert late > early + 0.15, (early, late)
    adapter = load_with_peft(tinker_rig.MODEL, log_dir / "final")
    weights = [p for name, p in adapter.named_parameters() if "lora_B" in name]
    assert len(weights) == 21
    assert all(p.abs().max() > 0 for p in weights)
    analysis = retrain("squeeze", log_dir / "final", "--json")
    assert analysis.returncode == 0, analysis.stderr
    assert tinker_rig.KEY not in "".join(p.read_text() for p in log_dir.glob("*.json*"))


def test_a_service_that_is_gone_for_too_long(config, tmp_path, proxy):
    path, log_dir = config(proxy.url, steps=5), tmp_path / "run"
    run = start(path)
    wait_for(lambda: len(metrics(log_dir)) >= 2, run)
    proxy.fault = lambda part: 503
    out, err = run.communicate(timeout=300)
    assert run.returncode == 1, err
    done = len(metrics(log_dir))
    assert 2 <= done < 5
    assert f"{proxy.url} does not answer (HTTP 503): waiting for it" in out + err
    assert "model.base_url" in err
    assert "backend.patience_s = 6" in err
    assert f"Checkpoint of step {done} written. Go on with: retrain" in err
    assert "Traceback" not in err
    # The service keeps each step's state for a while: not one step is lost, though none was due to be saved.
    state = json.loads((log_dir / "trainer_state.json").read_text())
    assert (state["step"], state["service"]["lasting"]) == (done, False)
    proxy.fault = lambda part: None
    resumed = retrain(log_dir / "config.toml", "--resume", log_dir)
    assert resumed.returncode == 0, resumed.stderr
    rows = metrics(log_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert max(row["logprob_gap_max"] for row in rows) < 1e-3


def test_a_service_that_stumbles(config, tmp_path, proxy):
    """Short outages and rate limits are waited out, and counted."""
    path, log_dir = config(proxy.url, steps=4), tmp_path / "run"
    run = start(path)
    wait_for(lambda: len(metrics(log_dir)) >= 1, run)
    proxy.fail_once("asample", 429)
    wait_for(lambda: len(metrics(log_dir)) >= 2, run)
    proxy.fail_once("retrieve_future", 502)
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    rows = metrics(log_dir)
    assert sum(row["service_rate_limits"] for row in rows) == 1
    assert sum(row["service_retries"] for row in rows) >= 2
    assert all(row["service_requests"] > 5 for row in rows)


REFUSED = [
    ("a wrong key", 401, [], "does not accept the key in TINKER_API_KEY"),
    ("an unknown model", None, ["--model", "Qwen/Qwen3-0.6B"], "has no such model"),
    ("another service", None, ["--service", "tinker"], 'set backend.service = "skyrl"'),
    ("a rank that is too high", None, ["--lora-rank", 64], "LoRA rank 64 must be between 1 and 8"),
    ("no room", None, ["--max-tokens", 5000], "context"),
]


@pytest.mark.parametrize(
    ("status", "flags", "needle"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_refused_before_anything_is_written(status, flags, needle, config, tmp_path, proxy):
    proxy.fault = lambda path: status
    done = retrain(config(proxy.url), *flags)
    assert done.returncode == 2, done.stderr
    assert needle in done.stderr
    assert "Traceback" not in done.stderr
    assert tinker_rig.KEY not in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()
