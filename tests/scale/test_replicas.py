"""The real command against two servers, one of which is killed in the middle of a step and started again."""

from __future__ import annotations

import pytest

import runs
from fake_server import FakeServer
from retrain.assets import resolve_model
from server_rig import dies_at, revive, wait_for

pytestmark = pytest.mark.scale

STEPS = 6
RUN = """
[model]
model = "builtin:tiny"
lora_rank = 4
[backend]
devices = "cpu"
adapter_path = "{folder}/adapters"
[inference]
engine = "vllm"
url = "{urls}"
request_timeout_s = 60
[algorithm]
advantage_mode = "grpo"
skip_uniform_groups = false
[loss]
entropy_coef = 0.01
[training]
seed = 3
max_steps = {steps}
batch_size = 2
group_size = 4
max_tokens = 8
lr = 1e-3
save_every = 50
gradient_checkpointing = false
[data]
source = "arithmetic"
[logging]
log_dir = "{folder}/run"
"""


def test_a_run_goes_on_without_a_server_and_with_it_again(tmp_path):
    base = resolve_model("builtin:tiny")
    with FakeServer(base, delay=0.1) as there, FakeServer(base, delay=0.1) as killed:
        config, metrics = tmp_path / "config.toml", tmp_path / "run" / "metrics.jsonl"
        config.write_text(RUN.format(folder=tmp_path, urls=f"{there.url},{killed.url}", steps=STEPS))
        process = runs.start(config)

        def done(step):
            assert process.poll() is None, process.communicate()
            return metrics.exists() and len(runs.lines(metrics)) >= step

        try:
            wait_for(lambda: done(1), "step 1", 120)
            dies_at(killed, 2)
            wait_for(lambda: done(2), "step 2", 120)
            asked = len(killed.completions())
            revive(killed)
            out, err = process.communicate(timeout=240)
        finally:
            process.kill()
    said = out + err
    assert process.returncode == 0, said
    steps = runs.lines(metrics)
    assert [row["policy_version"] for row in steps] == list(range(1, STEPS + 1))
    assert all(row["logprob_gap_max"] < 1e-3 for row in steps), "a server had another adapter"
    assert f"{killed.url} is dropped after" in said
    assert f"{killed.url} is back and serves policy version" in said
    assert len(killed.completions()) > asked + 4, "it got no work when it was back"
    assert f"by {there.url}, " in said and "completions served: " in said
    assert not list((tmp_path / "adapters").iterdir())
    assert not there.state.adapters
