"""Modular MAX on the CPU, started by `retrain serve`: samples from the base model, and cannot be trained with."""

from __future__ import annotations

import json

import pytest
import torch
from rig import REPOSITORY, free_port, retrain, serving
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from retrain.assets import resolve_model

PROGRAM = REPOSITORY / ".venv-max" / "bin" / "max"

pytestmark = [pytest.mark.servers, pytest.mark.timeout(900)]

RUN = """
[model]
model = "{folder}/llama"
lora_rank = 4
[backend]
devices = "cpu"
adapter_path = "{folder}/adapters"
[inference]
engine = "max"
url = "http://127.0.0.1:{port}"
[training]
max_steps = 1
batch_size = 4
group_size = 4
max_tokens = 8
max_prompt_tokens = 100
[data]
source = "arithmetic"
eval_fraction = 0.02
[eval]
temperature = 1.0
samples = 4
[logging]
log_dir = "{folder}/run"
"""


@pytest.fixture
def config(tmp_path):
    """A config of a small random Llama: MAX's build for CPUs ends with a segmentation fault on a small Qwen3."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("builtin:tiny"))
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    torch.manual_seed(0)
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(**sizes, **special)).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    path = tmp_path / "config.toml"
    path.write_text(RUN.format(folder=tmp_path, port=free_port()))
    return path


def test_it_is_evaluated_and_refuses_an_adapter(config, tmp_path):
    with serving(config, tmp_path / "server.log", PROGRAM):
        trained = retrain(config)
        assert trained.returncode == 2, trained.stderr
        assert 'inference.engine = "max": MAX takes adapters for Llama 3 models on one GPU only' in trained.stderr
        assert not (tmp_path / "run").exists()
        assert not (tmp_path / "adapters").exists()

        evaluated = retrain("eval", config, "--json")
        assert evaluated.returncode == 0, evaluated.stderr
        result = json.loads(evaluated.stdout)
        assert result["examples"] == 64
        assert result["samples"] == 4
        assert 1 <= result["mean_tokens"] <= 8
