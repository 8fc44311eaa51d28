"""`backend = "tinker"` in a config: what is refused, with the keys, and what has no effect."""

from __future__ import annotations

from typing import Any

import pytest

from retrain.config import Config, build, without_effect
from retrain.types import ConfigError

AT_A_SERVICE = {"backend.backend": "tinker", "training.temperature": 1.0}
AT_SKYRL = AT_A_SERVICE | {"backend.service": "skyrl", "training.max_grad_norm": 0.0}


def config_of(values: dict[str, Any]) -> Config:
    return build({}, overrides=values)


@pytest.mark.parametrize(
    "values",
    [
        AT_A_SERVICE,
        AT_SKYRL,
        AT_A_SERVICE | {"loss.kind": "ppo", "loss.clip_low": 0.1, "loss.aggregation": "seq_mean"},
        AT_A_SERVICE | {"loss.kind": "cispo", "loss.epochs": 2, "loss.minibatches": 4},
        AT_A_SERVICE | {"algorithm.uncertainty": "variance", "algorithm.transform_mode": "gtpo_sepa_hicra"},
        AT_A_SERVICE | {"training.weight_decay": 0.1, "training.lr_schedule": "cosine", "optimizer.beta1": 0.8},
        AT_A_SERVICE | {"model.base_url": "http://127.0.0.1:8000"},
    ],
)
def test_what_a_service_can_do(values: dict[str, Any]) -> None:
    config_of(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training.temperature": 0.7}, r"training\.temperature = 0\.7: .*set it to 1\.0"),
        ({"training.max_staleness": 1}, r"training\.max_staleness = 1: .*set it to 0"),
        ({"loss.kind": "gspo"}, r'loss\.kind = "gspo": .*importance_sampling, ppo and cispo'),
        ({"loss.kind": "ppo", "loss.dual_clip": 3.0}, r"loss\.dual_clip = 3\.0: .*set it to 0"),
        ({"loss.kl_coef": 0.1}, r"loss\.kl_coef = 0\.1"),
        ({"loss.entropy_coef": 0.1}, r"loss\.entropy_coef = 0\.1"),
        ({"loss.old_logprobs": "recompute"}, r'loss\.old_logprobs = "recompute": .*"sampler"'),
        ({"algorithm.uncertainty": "entropy"}, r'algorithm\.uncertainty = "entropy": .*"surprisal"'),
        ({"lora.dropout": 0.1}, r"lora\.dropout = 0\.1: .*remove it"),
        ({"lora.alpha": 32}, r"lora\.alpha = 32"),
        ({"lora.use_rslora": True}, r"lora\.use_rslora = true"),
        ({"lora.target_modules": ["q_proj"]}, r'lora\.target_modules = \["q_proj"\]'),
        ({"backend.service": "skyrl"}, r"training\.max_grad_norm = 1\.0: .*does not clip gradients; set it to 0"),
        ({"backend.patience_s": 301.0}, r"backend\.patience_s"),
        ({"model.base_url": "http://127.0.0.1:8000/?key=1"}, r"model\.base_url: .*TINKER_API_KEY"),
    ],
)
def test_what_it_cannot_do_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(AT_A_SERVICE | values)


def test_every_refusal_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        config_of({"backend.backend": "tinker", "loss.kind": "gspo", "lora.dropout": 0.5})
    assert all(key in str(caught.value) for key in ("training.temperature", "loss.kind", "lora.dropout"))


@pytest.mark.parametrize(
    ("values", "key", "reason"),
    [
        (AT_A_SERVICE | {"training.dtype": "bf16"}, "training.dtype", "tinker"),
        (AT_A_SERVICE | {"inference.merged_copy": False}, "inference.merged_copy", "tinker"),
        (AT_A_SERVICE | {"inference.request_timeout_s": 5.0}, "inference.request_timeout_s", "tinker"),
        ({"backend.max_concurrent": 4}, "backend.max_concurrent", "local"),
        ({"backend.patience_s": 5.0}, "backend.patience_s", "local"),
        ({"backend.state_ttl_s": 0}, "backend.state_ttl_s", "local"),
        ({"backend.service": "skyrl"}, "backend.service", "local"),
    ],
)
def test_without_effect(values: dict[str, Any], key: str, reason: str) -> None:
    lines = {line.partition(" = ")[0]: line for line in without_effect(config_of(values))}
    assert ": no effect " in lines[key]
    assert reason in lines[key]


def test_the_gap_between_sampler_and_trainer_counts_at_a_service_too() -> None:
    assert without_effect(config_of(AT_A_SERVICE | {"inference.max_logprob_gap": 0.1})) == []
