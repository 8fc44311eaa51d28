"""The engine on a real pretrained model, SmolLM2-135M-Instruct, in float32 on a CPU: `make test-smollm2`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
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


def test_engine_samples_what_transformers_computes() -> None:
    """Prompts go through the chat template, and log-probs are those of plain transformers, at the temperature."""
    from retrain import load_config
    from retrain.backend import open_backend
    from retrain.data import load
    from retrain.inference import open_engine
    from retrain.training.prompts import encode_prompts

    config = load_config(REPOSITORY / "configs" / "smollm2.toml", {"model.model": str(MODEL)})
    backend = open_backend(config, seed=1, say=lambda line: None)
    examples, prompts = encode_prompts(
        load(config.data, max_examples=2).train,
        backend.tokenizer,
        context=backend.context,
        max_tokens=20,
        max_prompt_tokens=0,
        say=lambda line: None,
    )
    streams = np.arange(8, dtype=np.uint64).reshape(2, 4)
    groups = open_engine(config.inference, backend).generate(prompts, streams, max_tokens=20, temperature=0.8)

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    for example, completions in zip(examples, groups, strict=True):
        turns = [{"role": "user", "content": example.prompt}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        for completion in completions:
            ids = torch.tensor([[*prompt, *completion.tokens_T]])
            with torch.no_grad():
                logprobs = (model(ids).logits[0, len(prompt) - 1 : -1] / 0.8).log_softmax(-1)
            expected = logprobs.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
            torch.testing.assert_close(torch.from_numpy(completion.logprobs_T), expected, atol=1e-4, rtol=0)


def test_adapter_trained(log_dir: Path) -> None:
    from safetensors.torch import load_file

    first = load_file(log_dir / "checkpoints" / "step_000000" / "adapter_model.safetensors")
    last = load_file(log_dir / "final" / "adapter_model.safetensors")
    assert first.keys() == last.keys()
    assert any(not torch.equal(first[name], last[name]) for name in first)


@pytest.mark.parametrize("name", ["smollm2", "smollm2-checkpointing"])
def test_the_estimated_peak_is_that_of_a_real_run(name: str) -> None:
    from benchmarks import memory

    found = memory.compare(memory.CASES[name])
    assert found["full_length"] == 1
    assert 0.8 < found["ratio"] < 1.2, found
