"""Combinations that are refused, capabilities that are not there yet, keys without effect, campaigns."""

from __future__ import annotations

from typing import Any

import pytest

from retrain.config import Config, build, run_kind, run_matrix, without_effect
from retrain.types import ConfigError


def config_of(**values: Any) -> Config:
    """config_of(training__lr=1) sets training.lr."""
    return build({}, {path.replace("__", "."): value for path, value in values.items()})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"inference__top_p": 0.9}, "inference.top_p / top_k: "),
        ({"inference__top_k": 5}, "inference.top_p / top_k: "),
        ({"algorithm__overlong_buffer": 8}, "algorithm.overlong_buffer: its penalty makes rewards negative"),
        (
            {"algorithm__overlong_buffer": 64, "training__max_tokens": 64, "algorithm__advantage_mode": "grpo"},
            "algorithm.overlong_buffer = 64: must be less than training.max_tokens (64)",
        ),
        ({"loss__dual_clip": 1.0}, "loss.dual_clip = 1.0: must be 0 (off) or greater than 1"),
        ({"loss__mismatch_correction": "mask"}, 'loss.mismatch_correction = "mask": '),
        (
            {"loss__minibatches": 9, "training__batch_size": 2, "training__group_size": 4},
            "loss.minibatches = 9: must not be more than the completions of a step",
        ),
        (
            {"training__lr_schedule": "cosine", "training__warmup_steps": 10, "training__max_steps": 10},
            "training.warmup_steps = 10: must be less than training.max_steps (10)",
        ),
        (
            {"backend__devices": "gpu:0,gpu:1,gpu:2"},
            'backend.devices = "gpu:0,gpu:1,gpu:2": the first samples and the last trains',
        ),
        (
            {"backend__devices": "gpu:0,gpu:1", "inference__engine": "vllm", "inference__url": "http://localhost:1"},
            'backend.devices = "gpu:0,gpu:1": with inference.engine = "vllm" its servers sample',
        ),
        (
            {"backend__devices": "gpu:0,gpu:1", "backend__sharding": "fsdp"},
            'backend.sharding = "fsdp": the process that samples would hold the whole base',
        ),
        (
            {"training__max_staleness": 1, "backpressure__enabled": True},
            "training.max_staleness = 1: backpressure would measure steps",
        ),
        (
            {"training__max_staleness": 2, "loss__old_logprobs": "recompute"},
            'training.max_staleness = 2: with loss.old_logprobs = "recompute" nothing corrects',
        ),
        ({"eval__samples": 4}, "eval.samples = 4: greedy completions are all the same"),
        ({"model__base_url": "https://x"}, "model.base_url: only the tinker backend"),
        ({"environment__provider": "verifiers"}, 'environment.provider = "verifiers": needs environment.id'),
        ({"environment__id": "a/b"}, 'environment.id: needs environment.provider = "verifiers"'),
        ({"environment__max_turns": 0}, "environment.max_turns = 0: must be -1 (no override) or >= 1"),
        (
            {"data__source": "reasoning_gym:dice", "reward__type": "math"},
            'data.source = "reasoning_gym:dice": its tasks score by themselves; remove reward.type',
        ),
        ({"reward__type": "judge"}, 'reward.type = "judge": needs reward.judge_model'),
        ({"reward__type": "custom"}, 'reward.type = "custom": needs reward.custom_module'),
        (
            {"backpressure__min_batch_size": 5, "backpressure__max_batch_size": 4},
            "backpressure.min_batch_size = 5: must not be above max_batch_size (4)",
        ),
        (
            {"backpressure__enabled": True, "loss__minibatches": 17},
            "loss.minibatches = 17: must not be more than the completions of the smallest step "
            "(backpressure.min_batch_size * training.group_size = 16)",
        ),
        (
            {"backpressure__enabled": True, "backpressure__max_batch_size": 4},
            "training.batch_size = 8: must lie within backpressure.min_batch_size and max_batch_size (1 to 4)",
        ),
        ({"squeeze__target_ranks": [0]}, "squeeze.target_ranks: every rank must be >= 1"),
        ({"squeeze__target_ranks": [4, 4]}, "squeeze.target_ranks: names a rank twice"),
        ({"squeeze__target_ranks": [9], "squeeze__source_rank": 8}, "squeeze.target_ranks: no rank may be above"),
        ({"squeeze__compress_to": 9, "squeeze__source_rank": 8}, "squeeze.compress_to = 9: must not be above"),
        ({"squeeze__compress_to": 4, "squeeze__per_layer": True}, "squeeze.compress_to = 4: with per_layer the ranks"),
        ({"squeeze__at_steps": [5]}, "squeeze.at_steps and squeeze.to_ranks: name 1 steps and 0 ranks"),
        ({"squeeze__at_steps": [0], "squeeze__to_ranks": [4]}, "squeeze.at_steps: must rise, from 1 on"),
        ({"squeeze__at_steps": [5, 5], "squeeze__to_ranks": [4, 2]}, "squeeze.at_steps: must rise, from 1 on"),
        ({"squeeze__at_steps": [5], "squeeze__to_ranks": [32]}, "squeeze.to_ranks: must fall, from below model."),
        ({"squeeze__at_steps": [5, 9], "squeeze__to_ranks": [4, 4]}, "squeeze.to_ranks: must fall, from below"),
        ({"squeeze__at_steps": [5], "squeeze__to_ranks": [0]}, "squeeze.to_ranks: must fall, from below"),
        (
            {"squeeze__at_steps": [5], "squeeze__to_ranks": [4], "training__max_steps": 4},
            "squeeze.at_steps: no step may lie after the last one (4)",
        ),
        (
            {
                "squeeze__at_steps": [5],
                "squeeze__to_ranks": [4],
                "backend__backend": "tinker",
                "training__temperature": 1.0,
            },
            'squeeze.at_steps: the adapter of backend.backend = "tinker" has the rank it begins with',
        ),
        ({"campaign__seeds": []}, "campaign.seeds: must name at least one seed"),
        ({"campaign__seeds": [1, 1]}, "campaign.seeds: names a seed twice"),
        ({"campaign__seeds": [-1]}, "campaign.seeds: every seed must be >= 0"),
        ({"campaign__ray_address": "x"}, 'campaign.ray_address: set campaign.executor = "ray"'),
    ],
)
def test_refused_combination(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config_of(**values)
    assert str(refused.value).startswith(expected)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "values",
    [
        {"training__group_size": 1},
        {"algorithm__overlong_buffer": 63, "training__max_tokens": 64, "algorithm__advantage_mode": "dr_grpo"},
        {"loss__dual_clip": 1.01},
        {"loss__mismatch_correction": "token", "loss__old_logprobs": "recompute"},
        {"loss__minibatches": 128},
        {"backend__devices": "cpu,cpu", "training__max_staleness": 2},
        {"training__max_staleness": 1, "loss__old_logprobs": "recompute", "loss__mismatch_correction": "token"},
        {"training__warmup_steps": 900},
        {"eval__samples": 4, "eval__temperature": 0.7},
        {"model__base_url": "https://x", "backend__backend": "tinker", "training__temperature": 1.0},
        {"squeeze__target_ranks": [8, 4], "squeeze__source_rank": 8, "squeeze__compress_to": 8},
    ],
)
def test_allowed_combination(values: dict[str, Any]) -> None:
    config_of(**values)


def test_a_campaign_shares_its_devices_out() -> None:
    campaign = config_of(campaign__parallel=True, backend__devices="gpu:0,gpu:1")
    assert {run.config.backend.devices for run in run_matrix(campaign)} == {"gpu:0"}


@pytest.mark.parametrize(
    ("values", "key", "reason"),
    [
        ({"gtpo__beta": 0.5, "algorithm__transform_mode": "none"}, "gtpo.beta", 'transform_mode = "none"'),
        ({"gtpo__beta": 0.5, "algorithm__transform_mode": "a.gtpo"}, "gtpo.beta", 'transform_mode = "a.gtpo"'),
        ({"hicra__alpha": 0.5}, "hicra.alpha", 'transform_mode = "gtpo_sepa"'),
        ({"sepa__steps": 5, "algorithm__transform_mode": "gtpo_hicra"}, "sepa.steps", "gtpo_hicra"),
        ({"sepa__ema_decay": 0.5}, "sepa.ema_decay", 'sepa.schedule = "linear"'),
        ({"sepa__warmup": 5}, "sepa.warmup", 'sepa.schedule = "linear"'),
        ({"algorithm__max_resample_rounds": 5}, "algorithm.max_resample_rounds", "dynamic_sampling"),
        ({"loss__clip_low": 0.1}, "loss.clip_low", 'loss.kind = "importance_sampling"'),
        ({"loss__dual_clip": 3, "loss__kind": "cispo"}, "loss.dual_clip", 'loss.kind = "cispo"'),
        ({"loss__kl_estimator": "k1"}, "loss.kl_estimator", "loss.kl_coef = 0"),
        ({"loss__mismatch_cap": 3}, "loss.mismatch_cap", "loss.mismatch_correction"),
        ({"planning__threshold": 0.5}, "planning.threshold", 'planning.detector = "regex"'),
        (
            {"planning__detector": "semantic", "logging__strategic_grams": "hmm"},
            "logging.strategic_grams",
            'planning.detector = "semantic"',
        ),
        ({"reward__judge_model": "m"}, "reward.judge_model", 'reward.type = "match"'),
        ({"backpressure__ema_decay": 0.5}, "backpressure.ema_decay", "backpressure.enabled"),
        (
            {"backpressure__enabled": True, "backpressure__peak_gflops": 9.0},
            "backpressure.peak_gflops",
            "backpressure.peak_bw_gb_s",
        ),
        (
            {"backpressure__enabled": True, "backpressure__min_batch_size": 7, "backpressure__max_batch_size": 8},
            "backpressure.enabled",
            "fewer than three sizes",
        ),
        ({"logging__wandb_group": "g"}, "logging.wandb_group", "logging.wandb_project"),
        ({"eval__examples": 5}, "eval.examples", "eval.every = 0"),
        ({"data__prompt_field": "q", "data__source": "arithmetic"}, "data.prompt_field", "arithmetic"),
        ({"data__prompt_field": "q", "data__source": "math:x"}, "data.prompt_field", "math:x"),
        (
            {"data__prompt_field": "q", "data__prompt_template": "{a}", "data__source": "x.csv"},
            "data.prompt_field",
            "data.prompt_template",
        ),
        ({"data__prompt_template": "{a}", "data__source": "a.b"}, "data.prompt_template", "a.b"),
        ({"data__prompt_template": "{a}", "data__source": "reasoning_gym:dice"}, "data.prompt_template", "dice"),
        ({"data__split": "test", "data__source": "x.json"}, "data.split", "x.json"),
        ({"inference__url": "http://x"}, "inference.url", 'inference.engine = "pytorch"'),
        (
            {"inference__merged_copy": False, "inference__engine": "vllm", "inference__url": "https://x"},
            "inference.merged_copy",
            'inference.engine = "vllm"',
        ),
        ({"squeeze__compress_to": 4, "squeeze__adapter_path": "x"}, "squeeze.compress_to", "squeeze.output_path"),
        ({"squeeze__per_layer": True, "squeeze__adapter_path": "x"}, "squeeze.per_layer", "squeeze.output_path"),
        ({"squeeze__device": "cuda"}, "squeeze.device", "in a training run (`retrain squeeze` uses it)"),
        (
            {"squeeze__adapter_path": "x", "squeeze__at_steps": [2], "squeeze__to_ranks": [2]},
            "squeeze.at_steps",
            "in a standalone squeeze",
        ),
    ],
)
def test_without_effect(values: dict[str, Any], key: str, reason: str) -> None:
    lines = {line.partition(" = ")[0]: line for line in without_effect(config_of(**values))}
    assert ": no effect " in lines[key]
    assert reason in lines[key]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"gtpo__beta": 0.5},
        {"hicra__alpha": 0.5, "algorithm__transform_mode": "gtpo_sepa_hicra"},
        {"sepa__ema_decay": 0.5, "sepa__schedule": "auto", "sepa__steps": 3},
        {"loss__clip_low": 0.1, "loss__kind": "cispo"},
        {"loss__kind": "gspo"},
        {"loss__kl_estimator": "k1", "loss__kl_coef": 0.1},
        {"data__prompt_field": "q", "data__source": "x.jsonl"},
        {"data__prompt_template": "{problem}", "data__split": "test", "data__source": "math"},
        {"data__prompt_template": "{a} {b}", "data__reference_field": "c", "data__source": "org/name"},
        {"reward__timeout_s": 5, "data__source": "reasoning_gym:dice"},
        {"eval__examples": 5, "eval__every": 1},
        {"training__lr": 1, "optimizer__beta1": 0.5, "lora__dropout": 0.1, "training__dtype": "fp32"},
    ],
)
def test_with_effect(values: dict[str, Any]) -> None:
    assert without_effect(config_of(**values)) == []


# ---- campaigns


def test_kind_of_run() -> None:
    assert run_kind(Config()) == "train"
    assert run_kind(config_of(squeeze__adapter_path="x")) == "squeeze"
    assert run_kind(config_of(squeeze__adapter_path="x", training__seed=1)) == "train"
    assert run_kind(config_of(squeeze__compress_to=4)) == "train"
    assert run_kind(config_of(campaign__parallel=True, squeeze__adapter_path="x")) == "campaign"


def test_no_campaign_has_no_runs() -> None:
    assert run_matrix(Config()) == ()


def test_the_ablation_is_what_a_campaign_without_conditions_runs() -> None:
    runs = run_matrix(config_of(campaign__seeds=[7, 8], campaign__max_steps=3))
    assert [run.name for run in runs] == [
        f"{condition}_s{seed}"
        for condition in ("grpo+none", "maxrl+none", "maxrl+gtpo", "maxrl+gtpo_hicra", "maxrl+gtpo_sepa")
        for seed in (7, 8)
    ]
    assert all(run.config.training.seed == run.seed and run.config.training.max_steps == 3 for run in runs)
    assert all(run.config.campaign is None for run in runs)
    assert runs[0].config.algorithm.advantage_mode == "grpo"
    assert runs[0].config.algorithm.transform_mode == "none"


def conditions(*tables: dict[str, Any], **base: Any) -> Config:
    return config_of(campaign__conditions=list(tables), campaign__seeds=[1], **base)


def test_conditions_override_the_base() -> None:
    nested = {"name": "a", "overrides": {"training": {"lr": 0.5}, "loss.kind": "gspo"}}
    flat = {"name": "b", "advantage_mode": "grpo", "overrides": {"training.lr": 0.25}}
    first, second = run_matrix(conditions(nested, flat, training__lr=1, training__max_steps=9))
    assert (first.config.training.lr, first.config.training.max_steps) == (0.5, 9)
    assert (first.config.loss.kind, first.config.loss.clip_low) == ("gspo", 3e-4)
    assert (second.config.training.lr, second.config.algorithm.advantage_mode) == (0.25, "grpo")
    assert second.config.loss.clip_low == 0.2


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        (
            [{"name": "a", "overrides": {"training.lrr": 1}}],
            'campaign condition "a": training.lrr: unknown key; did you mean "lr"?',
        ),
        (
            [{"name": "a", "overrides": {"training.lr": -1}}],
            'campaign condition "a": training.lr = -1: out of range, must be >= 0',
        ),
        (
            [{"name": "a", "overrides": {"inference.top_p": 0.5}}],
            'campaign condition "a": inference.top_p / top_k: ',
        ),
        (
            [{"name": "a", "overrides": {"training.seed": 1}}],
            'campaign condition "a": training.seed is decided by the campaign',
        ),
        ([{"name": "a"}, {"name": "a"}], 'campaign.conditions: two are named "a"'),
        ([{}, {}], 'campaign.conditions: two are named "maxrl+gtpo_sepa"'),
    ],
)
def test_wrong_condition(tables: list[dict[str, Any]], expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run_matrix(conditions(*tables))
    assert str(refused.value).startswith(expected)


@pytest.mark.parametrize("name", ["a/b", "../x", ".hidden", "a b"])
def test_a_condition_name_is_a_folder_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^campaign\.conditions\[0\]\.name = .*: names a folder"):
        conditions({"name": name})


def test_a_campaigns_runs_take_their_own_part_of_squeeze() -> None:
    """When to squeeze is a run's matter, and a condition's; the analysis is the campaign's."""
    config = config_of(
        campaign__seeds=[1],
        campaign__max_steps=2000,
        campaign__conditions=[
            {"name": "plain"},
            {"name": "late", "overrides": {"squeeze.at_steps": [1500]}},
            {"name": "never", "overrides": {"squeeze.at_steps": [], "squeeze.to_ranks": []}},
        ],
        squeeze__at_steps=[10],
        squeeze__to_ranks=[4],
        squeeze__min_variance_retention=0.9,
    )
    sections = [run.config.squeeze for run in run_matrix(config)]
    assert [section and section.at_steps for section in sections] == [(10,), (1500,), ()]
    assert all(section and section.min_variance_retention == 0.95 for section in sections)
    alone = config_of(campaign__seeds=[1], squeeze__min_variance_retention=0.9)
    assert [run.config.squeeze for run in run_matrix(alone)] == [None] * len(run_matrix(alone))
