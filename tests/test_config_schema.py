"""The schema against the promised reference, copied here by hand."""

from __future__ import annotations

import json
import math

import pytest
from pydantic import ValidationError

from retrain.config import KEYS, SECTIONS, Config, LoraConfig, LossConfig, build, json_schema, value_of
from retrain.types import ConfigError

# (type, default) of every promised key, from the reference that users were given.
PROMISED = {
    "backend.backend": (str, "local"),
    "backend.devices": (str, "gpu:0"),
    "backend.adapter_path": (str, "/tmp/retrain_adapter"),
    "model.model": (str, "Qwen/Qwen3-4B-Instruct-2507"),
    "model.base_url": (str, ""),
    "model.lora_rank": (int, 32),
    "model.trust_remote_code": (bool, False),
    "algorithm.advantage_mode": (str, "maxrl"),
    "algorithm.transform_mode": (str, "gtpo_sepa"),
    "training.seed": (int, -1),
    "training.max_steps": (int, 500),
    "training.batch_size": (int, 8),
    "training.group_size": (int, 16),
    "training.max_tokens": (int, 2048),
    "training.temperature": (float, 0.7),
    "training.lr": (float, 4e-5),
    "training.weight_decay": (float, 0.0),
    "training.max_examples": (int, 0),
    "training.save_every": (int, 20),
    "optimizer.beta1": (float, 0.9),
    "optimizer.beta2": (float, 0.95),
    "optimizer.eps": (float, 1e-8),
    "lora.alpha": (int, 0),
    "lora.dropout": (float, 0.0),
    "data.source": (str, "math"),
    "environment.provider": (str, ""),
    "environment.id": (str, ""),
    "environment.args": (dict, {}),
    "environment.max_turns": (int, -1),
    "environment.auto_install": (bool, False),
    "environment.timeout_s": (float, 120.0),
    "planning.detector": (str, "regex"),
    "planning.model": (str, "all-MiniLM-L6-v2"),
    "planning.threshold": (float, 0.02),
    "gtpo.beta": (float, 0.1),
    "hicra.alpha": (float, 0.2),
    "sepa.steps": (int, 500),
    "sepa.schedule": (str, "linear"),
    "sepa.delay_steps": (int, 50),
    "sepa.correct_rate_gate": (float, 0.1),
    "inference.engine": (str, "pytorch"),
    "inference.url": (str, ""),
    "inference.allow_http": (bool, False),
    "inference.attention_kernel": (str, "default"),
    "inference.dtype": (str, "auto"),
    "inference.kv_cache_dtype": (str, "auto"),
    "inference.prefix_caching": (bool, True),
    "reward.type": (str, "match"),
    "reward.judge_model": (str, ""),
    "reward.custom_module": (str, ""),
    "reward.custom_function": (str, "score"),
    "backpressure.enabled": (bool, False),
    "backpressure.warmup_steps": (int, 10),
    "backpressure.ema_decay": (float, 0.9),
    "backpressure.throttle_margin": (float, 0.85),
    "backpressure.increase_margin": (float, 0.5),
    "backpressure.min_batch_size": (int, 1),
    "backpressure.max_batch_size": (int, 64),
    "backpressure.peak_gflops": (float, 0.0),
    "backpressure.peak_bw_gb_s": (float, 0.0),
    "squeeze.min_variance_retention": (float, 0.95),
    "squeeze.adapter_path": (str, ""),
    "squeeze.source_rank": (int, 0),
    "squeeze.target_ranks": (tuple, ()),
    "squeeze.output_path": (str, ""),
    "squeeze.compress_to": (int, 0),
    "squeeze.device": (str, "cpu"),
    "squeeze.per_layer": (bool, False),
    "squeeze.at_steps": (tuple, ()),
    "squeeze.to_ranks": (tuple, ()),
    "resume.from": (str, ""),
    "logging.log_dir": (str, "logs/train"),
    "logging.wandb_project": (str, ""),
    "logging.wandb_run_name": (str, ""),
    "logging.wandb_entity": (str, ""),
    "logging.wandb_group": (str, ""),
    "logging.wandb_tags": (str, ""),
    "logging.strategic_grams": (str, ""),
    # beyond the reference
    "algorithm.uncertainty": (str, "auto"),
    "algorithm.skip_uniform_groups": (bool, True),
    "algorithm.dynamic_sampling": (bool, False),
    "algorithm.max_resample_rounds": (int, 3),
    "algorithm.overlong_buffer": (int, 0),
    "loss.kind": (str, "importance_sampling"),
    "loss.clip_low": (float, 0.2),
    "loss.clip_high": (float, 0.28),
    "loss.dual_clip": (float, 0.0),
    "loss.aggregation": (str, "token_mean"),
    "loss.kl_coef": (float, 0.0),
    "loss.kl_estimator": (str, "k3"),
    "loss.entropy_coef": (float, 0.0),
    "loss.old_logprobs": (str, "sampler"),
    "loss.mismatch_correction": (str, "none"),
    "loss.mismatch_cap": (float, 2.0),
    "loss.epochs": (int, 1),
    "loss.minibatches": (int, 1),
    "training.max_staleness": (int, 0),
    "training.micro_batch_tokens": (int, 16384),
    "training.gradient_checkpointing": (bool, True),
    "training.max_grad_norm": (float, 1.0),
    "training.lr_schedule": (str, "constant"),
    "training.warmup_steps": (int, 0),
    "training.dtype": (str, "auto"),
    "training.max_prompt_tokens": (int, 0),
    "training.keep_checkpoints": (int, 3),
    "lora.target_modules": (str, "all-linear"),
    "lora.use_rslora": (bool, False),
    "sepa.ema_decay": (float, 0.99),
    "sepa.variance_threshold": (float, 0.2),
    "sepa.warmup": (int, 50),
    "data.prompt_field": (str, "prompt"),
    "data.prompt_template": (str, ""),
    "data.reference_field": (str, "reference"),
    "data.split": (str, "train"),
    "data.shuffle": (bool, True),
    "data.eval_fraction": (float, 0.0),
    "eval.every": (int, 0),
    "eval.examples": (int, 64),
    "eval.samples": (int, 1),
    "eval.temperature": (float, 0.0),
    "inference.top_p": (float, 1.0),
    "inference.top_k": (int, 0),
    "inference.max_logprob_gap": (float, 0.0),
    "backend.sharding": (str, "none"),
    "backend.service": (str, "tinker"),
    "backend.max_concurrent": (int, 64),
    "backend.patience_s": (float, 60.0),
    "backend.state_ttl_s": (int, 86400),
    "inference.request_timeout_s": (float, 600.0),
    "inference.retries": (int, 5),
    "inference.merged_copy": (bool, True),
    "training.strict": (bool, False),
    "logging.credit_samples": (int, 2),
    "logging.tensorboard": (bool, False),
    "reward.judge_url": (str, ""),
    "reward.judge_rubric": (str, ""),
    "reward.judge_verdict": (str, "correct"),
    "reward.judge_concurrency": (int, 32),
    "reward.judge_timeout_s": (float, 60.0),
    "reward.judge_retries": (int, 5),
    "reward.timeout_s": (float, 10.0),
    "reward.max_error_rate": (float, 0.5),
    "reward.parts": (tuple, ()),
    "campaign.seeds": (tuple, (42, 101, 202, 303, 404, 505, 606, 707)),
    "campaign.max_steps": (int, 0),
    "campaign.parallel": (bool, False),
    "campaign.max_workers": (int, 0),
    "campaign.stagger_seconds": (float, 0.0),
    "campaign.executor": (str, "local"),
    "campaign.ray_address": (str, ""),
    "campaign.conditions": (tuple, ()),
}

CHOICES = {
    "backend.backend": ("local", "tinker"),
    "backend.service": ("tinker", "skyrl"),
    "backend.sharding": ("none", "fsdp"),
    "algorithm.advantage_mode": ("grpo", "dr_grpo", "rloo", "reinforce_pp", "maxrl"),
    "algorithm.transform_mode": ("none", "gtpo", "gtpo_hicra", "gtpo_sepa", "gtpo_sepa_hicra"),
    "algorithm.uncertainty": ("auto", "entropy", "surprisal", "variance"),
    "sepa.schedule": ("linear", "auto"),
    "inference.engine": ("pytorch", "max", "vllm", "sglang", "mlx", "openai"),
    "inference.attention_kernel": ("default", "flash", "triton", "tk", "cutlass"),
    "inference.dtype": ("auto", "bf16", "fp8", "fp4"),
    "inference.kv_cache_dtype": ("auto", "bf16", "fp8", "int8"),
    "environment.provider": ("", "verifiers"),
    "reward.type": ("match", "math", "judge", "custom"),
    "reward.judge_verdict": ("correct", "score"),
    "planning.detector": ("regex", "semantic"),
    "loss.kind": ("importance_sampling", "ppo", "cispo", "gspo"),
    "loss.aggregation": ("token_mean", "seq_mean", "constant"),
    "loss.kl_estimator": ("k1", "k2", "k3"),
    "loss.old_logprobs": ("sampler", "recompute"),
    "loss.mismatch_correction": ("none", "token", "sequence", "mask"),
    "training.lr_schedule": ("constant", "linear", "cosine"),
    "training.dtype": ("auto", "fp32", "bf16"),
    "campaign.executor": ("local", "ray"),
}

# A value just outside the range of each bounded key, and one on its edge.
EDGES = {
    "model.lora_rank": (0, 1),
    "training.seed": (-2, -1),
    "training.max_steps": (0, 1),
    "training.batch_size": (0, 1),
    "training.group_size": (0, 1),
    "training.max_tokens": (0, 1),
    "training.temperature": (0.0, 1e-9),
    "training.lr": (-1e-9, 0.0),
    "training.max_examples": (-1, 0),
    "training.save_every": (0, 1),
    "optimizer.beta1": (1.0, 0.0),
    "optimizer.beta2": (-0.1, 0.999),
    "optimizer.eps": (0.0, 1e-12),
    "lora.dropout": (1.0, 0.0),
    "sepa.correct_rate_gate": (1.01, 1.0),
    "sepa.ema_decay": (1.0, 0.0),
    "planning.threshold": (2.1, 2.0),
    "data.eval_fraction": (1.0, 0.0),
    "inference.retries": (-1, 0),
    "backend.max_concurrent": (0, 1),
    "backend.patience_s": (301.0, 300.0),
    "backend.state_ttl_s": (-1, 0),
    "inference.request_timeout_s": (0, 0.5),
    "loss.clip_low": (1.0, 0.0),
    "reward.max_error_rate": (1.1, 1.0),
    "reward.judge_concurrency": (0, 1),
    "gtpo.beta": (-0.1, 0),
    "hicra.alpha": (-0.1, 0),
    "backpressure.throttle_margin": (0.0, 1.0),
    "squeeze.min_variance_retention": (0.0, 1.0),
    "campaign.stagger_seconds": (-1, 0),
}


def as_data(path: str, value: object) -> dict[str, dict[str, object]]:
    section, name = path.split(".")
    return {section: {name: value}}


def test_every_promised_key_is_there_and_no_other() -> None:
    assert set(KEYS) == set(PROMISED)


@pytest.mark.parametrize("path", PROMISED)
def test_type_and_default(path: str) -> None:
    kind, default = PROMISED[path]
    key = KEYS[path]
    assert key.default == default
    assert type(key.default) is kind
    assert value_of(Config(), key) == default
    assert key.description.endswith((".", "`"))


def test_sections_and_attributes() -> None:
    assert set(SECTIONS) == {path.split(".")[0] for path in PROMISED}
    config = build({"resume": {"from": "logs/x"}})
    assert config.resume.from_ == "logs/x"
    assert Config().squeeze is None
    assert Config().campaign is None


# What a choice cannot do without.
SERVER = {"inference.engine": "vllm", "inference.url": "http://127.0.0.1:8000"}
COMPANIONS = {
    **{engine: SERVER | {"inference.engine": engine} for engine in ("max", "vllm", "sglang", "mlx", "openai")},
    **dict.fromkeys(("flash", "triton", "fp8", "fp4", "int8"), SERVER),
    "tinker": {"training.temperature": 1.0},
    "verifiers": {"environment.id": "x/y"},
    "judge": {"reward.judge_model": "m"},
    "custom": {"reward.custom_module": "m"},
    "token": {"loss.old_logprobs": "recompute"},
    "sequence": {"loss.old_logprobs": "recompute"},
    "mask": {"loss.old_logprobs": "recompute"},
}


@pytest.mark.parametrize("path", CHOICES)
def test_choices(path: str) -> None:
    assert KEYS[path].choices == CHOICES[path]
    for choice in CHOICES[path]:
        if choice in ("tk", "cutlass"):  # no engine has them: tests/test_engines.py
            continue
        config = build(as_data(path, choice), COMPANIONS.get(choice))
        assert value_of(config, KEYS[path]) == choice
    with pytest.raises(ConfigError, match=f"must be one of .*{CHOICES[path][-1]}"):
        build(as_data(path, "no such choice"))


@pytest.mark.parametrize("path", EDGES)
def test_range(path: str) -> None:
    outside, edge = EDGES[path]
    assert value_of(build(as_data(path, edge)), KEYS[path]) == edge
    with pytest.raises(ConfigError) as refused:
        build(as_data(path, outside))
    assert str(refused.value) == f"{path} = {outside}: out of range, must be {KEYS[path].range}"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("training.group_size", "3", "must be an integer; write 3 without quotes"),
        ("training.group_size", 3.0, "must be an integer"),
        ("training.group_size", True, "must be an integer"),
        ("training.lr", "1e-4", "must be a number; write 1e-4 without quotes"),
        ("training.lr", "fast", "must be a number"),
        ("training.lr", False, "must be a number"),
        ("training.lr", math.nan, "must be a finite number"),
        ("training.lr", math.inf, "must be a finite number"),
        ("data.shuffle", 1, "must be true or false"),
        ("data.shuffle", "false", "must be true or false; write false without quotes"),
        ("logging.log_dir", 3, 'must be a string, in quotes: "3"'),
        ("logging.log_dir", "", "must not be empty"),
        ("squeeze.target_ranks", 4, "must be a list"),
        ("environment.args", 4, "must be a table, or a JSON string that holds an object"),
        ("environment.args", "[1]", "must be a table, or a JSON string that holds an object"),
        ("lora.target_modules", [], 'must be "all-linear" or a non-empty list of module names'),
        ("lora.target_modules", "q_proj", 'must be "all-linear" or a list of module names, as in ["q_proj"]'),
        ("training.seed", 2**32, "out of range, must be -1 <= x <= 4294967295"),
    ],
)
def test_wrong_value(path: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build(as_data(path, value))
    assert str(refused.value).startswith(f"{path} = ")
    assert str(refused.value).endswith(f": {expected}")


def test_an_integer_is_a_number() -> None:
    lr = build({"training": {"lr": 1}}).training.lr
    assert lr == 1.0
    assert type(lr) is float


@pytest.mark.parametrize("mode", ["pkg.mod.fn", "a.b"])
def test_plugins_by_dotted_path(mode: str) -> None:
    config = build({"algorithm": {"advantage_mode": mode, "transform_mode": mode}, "data": {"source": mode}})
    assert (config.algorithm.advantage_mode, config.algorithm.transform_mode, config.data.source) == (mode,) * 3


@pytest.mark.parametrize(
    "source",
    [
        *("math", "gsm8k", "arithmetic", "arithmetic:words", "reasoning_gym:sudoku", "reasoning_gym:ab,dice"),
        *("math:/a b", "gsm8k:data/gsm8k", "x.jsonl", "/a b/x.json", "../x.csv", "x.parquet"),
        *("org/name", "org/name:config", "pkg.fn"),
    ],
)
def test_sources(source: str) -> None:
    assert build({"data": {"source": source}}).data.source == source


@pytest.mark.parametrize("source", ["", "arithmetik", "reasoning_gym:", "a b", "x.txt y", "arithmetic:wrods", "math:"])
def test_wrong_source(source: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.source = "):
        build({"data": {"source": source}})


def test_devices_are_normalised() -> None:
    assert build({"backend": {"devices": "gpu:0, gpu:1"}}).backend.devices == "gpu:0,gpu:1"


def test_args_as_json_string_or_table() -> None:
    table = {"split": "train", "n": 3, "deep": {"x": [1, 2.5, True]}}
    for written in (table, json.dumps(table)):
        assert build({"environment": {"args": written}}).environment.args == table


@pytest.mark.parametrize("text", ['{"a": null}', '{"a": NaN}', '{"a": 1e999}', "{"])
def test_args_that_toml_could_not_hold(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^environment\.args = "):
        build({"environment": {"args": text}})


def test_gspo_has_its_own_clip_defaults() -> None:
    def clips(**loss: object) -> tuple[float, float]:
        section = build({"loss": loss}).loss
        return section.clip_low, section.clip_high

    assert clips() == (0.2, 0.28)
    assert clips(kind="ppo") == (0.2, 0.28)
    assert clips(kind="gspo") == (3e-4, 4e-4)
    assert clips(kind="gspo", clip_high=0.28) == (3e-4, 0.28)


def test_lora_alpha() -> None:
    assert LoraConfig().alpha_for(rank=8) == 16
    assert LoraConfig(alpha=3).alpha_for(rank=8) == 3


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().training.lr = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        Config().loss = LossConfig()  # type: ignore[misc]


def test_json_schema_says_what_the_schema_says() -> None:
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert json.loads(json.dumps(schema)) == schema
    assert '"null"' not in json.dumps(schema)
    for path, key in KEYS.items():
        reference = schema["properties"][key.section]["$ref"].removeprefix("#/$defs/")
        section = schema["$defs"][reference]
        assert section["additionalProperties"] is False
        entry = section["properties"][key.name]
        assert entry["description"] == key.description
        assert entry.get("default", {} if key.type == "table / str" else None) == json.loads(json.dumps(key.default))
        options = [entry, *entry.get("anyOf", [])]
        if key.choices:
            assert any(option.get("enum") == list(key.choices) for option in options)
        if path in EDGES:
            assert {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"} & set(entry)
