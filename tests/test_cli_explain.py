"""`explain`, and the sizes it states against models that transformers and PEFT really build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from retrain import estimate
from retrain.cli import main
from retrain.cli.explain import human_bytes

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 101,
}
MODELS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False, head_dim=8),
    "llama with biases": LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, head_dim=16),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True, head_dim=32),
    "qwen3 untied": Qwen3Config(**SIZES, tie_word_embeddings=False, head_dim=32, attention_bias=True),
}


def shape_in(folder: Path) -> estimate.ModelShape:
    model_config = estimate.find_model_config(str(folder))
    assert model_config is not None
    shape = estimate.shape_of(model_config)
    assert shape is not None
    return shape


# PEFT asks transformers for an attribute that transformers has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_counts_are_those_of_the_real_model(name: str, tmp_path: Path) -> None:
    MODELS[name].save_pretrained(tmp_path)
    shape = shape_in(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MODELS[name])
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    for targets in ("all-linear", ["q_proj", "down_proj"]):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(MODELS[name])
            adapted = get_peft_model(model, LoraConfig(r=5, target_modules=targets, task_type="CAUSAL_LM"))
        trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        wanted = targets if isinstance(targets, str) else tuple(targets)
        assert shape.lora_parameters(5, wanted) == trainable


@pytest.mark.parametrize("text", ["not json", "[1]", '{"model_type": "gpt2", "n_embd": 8}'])
def test_models_that_cannot_be_counted(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    model_config = estimate.find_model_config(str(tmp_path))
    assert model_config is None or estimate.shape_of(model_config) is None


def test_experts_are_not_guessed() -> None:
    assert estimate.shape_of({**SIZES, "model_type": "x"}) is not None
    assert estimate.shape_of({**SIZES, "model_type": "x", "num_experts": 8}) is None


@pytest.mark.parametrize("name", ["no/such-model", "no such id", "a/b/c", "/nowhere"])
def test_models_that_are_not_here(name: str) -> None:
    assert estimate.find_model_config(name) is None


def test_human_bytes() -> None:
    assert [human_bytes(count) for count in (0, 1023, 1536, 2**20, 5 * 2**40)] == [
        *("0 B", "1023 B", "1.5 KiB", "1.0 MiB", "5.0 TiB")
    ]


# ---- the command

CONFIG = """
[model]
model = "{model}"
[data]
source = "math"
[hicra]
alpha = 0.3
[training]
max_steps = 7
"""
CAMPAIGN = """
[campaign]
seeds = [1, 2]
[[campaign.conditions]]
transform_mode = "gtpo_hicra"
[[campaign.conditions]]
transform_mode = "none"
overrides = { "planning.detector" = "semantic", "logging.wandb_tags" = "a" }
"""


def explain(path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(["explain", str(path), "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def written(folder: Path, text: str) -> Path:
    MODELS["qwen3"].save_pretrained(folder / "model")
    path = folder / "c.toml"
    path.write_text(text.replace("{model}", str(folder / "model")), encoding="utf-8")
    return path


def test_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = explain(written(tmp_path, CONFIG), capsys, "--lr", "1", "--batch-size", "3")
    assert facts["kind"] == "train"
    assert facts["changed"] == {
        "model.model": str(tmp_path / "model"),
        "training.max_steps": 7,
        "training.batch_size": 3,
        "training.lr": 1.0,
        "hicra.alpha": 0.3,
    }
    assert facts["config"]["training"]["lr"] == 1
    assert facts["no_effect"] == ['hicra.alpha = 0.3: no effect with algorithm.transform_mode = "gtpo_sepa"']
    assert facts["runs"] == []
    assert facts["tokens_per_step"]["completion_tokens"] == 3 * 16 * 2048
    assert {size["name"] for size in facts["sizes"]} >= {"base weights", "KV cache", "Adam state", "logits [N, V]"}
    (process,) = facts["processes"]
    assert facts["peak_bytes"] == process["peak_bytes"]
    assert [phase["name"] for phase in process["phases"]] == ["sampling", "publishing", "training"]
    parts = [part["bytes"] for part in process["kept"]]
    assert process["peak_bytes"] == sum(parts) + max(phase["bytes"] for phase in process["phases"])


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(written(tmp_path, CONFIG)), "--lr", "1"]) == 0
    text = capsys.readouterr().out
    assert "  * lr = 1.0  (default 4e-05)  from --lr\n" in text
    assert "  * max_steps = 7  (default 500)\n" in text
    assert "    batch_size = 8\n" in text
    assert "absent: [squeeze], [campaign]" in text
    assert "hicra.alpha = 0.3: no effect" in text
    assert "(never allocated)" in text
    assert "\x1b[" not in text


def test_memory_per_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, CONFIG)
    one, four = (explain(path, capsys, "--nproc", n)["processes"][0] for n in ("1", "4"))
    assert (one["count"], four["count"]) == (1, 4)
    assert four["kept_bytes"] == one["kept_bytes"]
    assert four["phases"][0]["bytes"] < one["phases"][0]["bytes"], "completions are shared out"
    assert main(["explain", str(path), "--nproc", "4"]) == 0
    assert "  each of 4 processes on gpu:0: " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_wrong_number_of_processes_is_exit_2(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(written(tmp_path, CONFIG)), f"--nproc={text}"]) == 2
    assert capsys.readouterr().err == f"error: --nproc {text}: must be a number of processes, 1 or more\n"


def test_split_mode_shows_both_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, CONFIG)
    facts = explain(path, capsys, "--devices", "gpu:0,gpu:1")
    assert [(one["name"], one["device"]) for one in facts["processes"]] == [("sampler", "gpu:0"), ("trainer", "gpu:1")]
    assert main(["explain", str(path), "--devices", "gpu:0,gpu:1", "--nproc", "2"]) == 2
    assert "name one device" in capsys.readouterr().err


def test_campaign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, CONFIG + CAMPAIGN)
    facts = explain(path, capsys)
    assert facts["kind"] == "campaign"
    assert [run["name"] for run in facts["runs"]] == [
        *("maxrl+gtpo_hicra_s1", "maxrl+gtpo_hicra_s2", "maxrl+none_s1", "maxrl+none_s2")
    ]
    assert facts["runs"][2]["changed"] == {
        "algorithm.transform_mode": "none",
        "training.seed": 1,
        "planning.detector": "semantic",
        "logging.wandb_tags": "a",
    }
    assert facts["no_effect"] == [], "hicra.alpha has an effect in one of the conditions"
    assert main(["explain", str(path)]) == 0
    text = capsys.readouterr().out
    assert "Runs: 4, 28 steps in all" in text
    assert "  maxrl+none_s{1,2}\n" in text


def test_a_model_that_is_not_downloaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[model]\nmodel = "no-such-org/no-such-model"', encoding="utf-8")
    facts = explain(path, capsys)
    assert facts["model"] == "no-such-org/no-such-model: sizes unknown until downloaded"
    assert facts["sizes"] is None
    assert main(["explain", str(path)]) == 0
    assert "unknown until downloaded" in capsys.readouterr().out


def test_wrong_config_is_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[training]\nlr = -1", encoding="utf-8")
    assert main(["explain", str(path)]) == 2
    assert capsys.readouterr().err == f"error: {path}:2: training.lr = -1: out of range, must be >= 0\n"
