"""The engine on a real pretrained model, SmolLM2-135M-Instruct, in float32 on a CPU: `make test-smollm2`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

REPOSITORY = Path(__file__).parents[2]
MODEL = REPOSITORY / "models" / "SmolLM2-135M-Instruct"

pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of configs/smollm2.toml; every group is trained on, and an entropy bonus moves the adapter anyhow."""
    folder = tmp_path_factory.mktemp("smollm2") / "run"
    command = [sys.executable, "-m", "retrain", "configs/smollm2.toml", "--log-dir", str(folder), "--max-steps", "2"]
    command += ["--batch-size", "2", "--group-size", "8", "--no-skip-uniform-groups", "--entropy-coef", "0.01"]
    command += ["--training-temperature", "1.0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_sampler_and_trainer_agree(log_dir: Path) -> None:
    rows = [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["num_datums"] == 16
        assert row["logprob_gap_max"] < 1e-4
        assert row["ratio_mean"] == pytest.approx(1, abs=1e-5)


def test_completions_follow_the_chat_template(log_dir: Path) -> None:
    """The uncertainty of recorded completions is the entropy that plain transformers gives on the templated prompt."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    checked = 0
    for line in (log_dir / "generations.jsonl").read_text().splitlines()[:16]:  # step 1: the adapter is still zero
        row = json.loads(line)
        turns = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        if row["finish_reason"] == "stop":
            answer.append(tokenizer.eos_token_id)
        if len(answer) != row["num_tokens"]:
            continue  # sampled in another tokenisation than the tokenizer's own
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        assert row["uncertainty_mean"] == pytest.approx(entropy.mean().item(), abs=1e-3)
        checked += 1
    assert checked >= 4


def test_adapter_trained(log_dir: Path) -> None:
    from safetensors.torch import load_file

    first = load_file(log_dir / "checkpoints" / "step_000000" / "adapter_model.safetensors")
    last = load_file(log_dir / "final" / "adapter_model.safetensors")
    assert first.keys() == last.keys()
    assert any(not torch.equal(first[name], last[name]) for name in first)
