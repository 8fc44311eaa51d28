"""Modular MAX on the CPU, started by `retrain serve`: samples from the base model, and cannot be trained with."""

from __future__ import annotations

import json

import pytest
import torch
from rig import REPOSITORY, free_port, retrain, serving
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
examples = 32
[logging]
log_dir = "{folder}/run"
"""


@pytest.fixture
def config(tmp_path):
    """A config of a small random Llama: MAX's build for CPUs ends with a segmentation fault on a small Qwen3.

    Its tokens are single characters, so that whatever it samples can be told from its text.
    """
    # More of them than it takes: with a vocabulary of 98, MAX ends at the first request.
    characters = [chr(code) for code in (10, *range(32, 127), *range(0xC0, 0x240))]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *characters])}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<pad>"))
    tokenizer.decoder = Fuse()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    wrapped.save_pretrained(tmp_path / "llama")
    sizes = {
        "vocab_size": len(vocabulary),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    torch.manual_seed(0)
    special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**sizes, **special)).save_pretrained(tmp_path / "llama")
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
        # A padding token that is sampled leaves no trace in the text: that completion is left out.
        assert result["errors"] < 8
        assert "cannot be compared" not in evaluated.stderr, "its log-probs were not compared with the model's"
        assert result["examples"] == 32
        assert 1 <= result["mean_tokens"] <= 8
