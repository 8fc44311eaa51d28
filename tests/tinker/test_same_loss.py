"""The same config in this process and at the service: the same loss, gradient and update. `make test-tinker`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tinker_rig

import tiny_models as models
from retrain.backend.local import LocalBackend
from retrain.backend.tinker import TinkerBackend, wire
from retrain.backend.tinker.update import measured, prepare
from retrain.inference.tinker import TinkerEngine

pytestmark = [pytest.mark.tinker, pytest.mark.timeout(900)]

RANK = 8
KEYS = {
    "model.lora_rank": RANK,
    "training.temperature": 1.0,
    "training.max_grad_norm": 0.0,
    "training.max_tokens": 12,
    "training.lr": 1e-2,
    "algorithm.uncertainty": "surprisal",
    "gtpo.beta": 0.5,
}


def config_of(**overrides):
    return models.config_for("builtin:tiny", **{key.replace(".", "__"): v for key, v in KEYS.items()} | overrides)


def at_service(config, url):
    return config.model_copy(
        update={
            "backend": config.backend.model_copy(update={"backend": "tinker", "service": "skyrl"}),
            "model": config.model.model_copy(update={"base_url": url}),
        }
    )


@pytest.fixture(scope="module")
def remote(server):
    """A backend at the service, a little trained: B is no longer zero."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_API_KEY", tinker_rig.KEY)
        backend = TinkerBackend(at_service(config_of(), server), seed=5, say=lambda line: None)
        backend.step(sampled(TinkerEngine(backend), backend), 0)
        yield backend
        backend.service.close()


@pytest.fixture(scope="module")
def batch(remote):
    """Completions of the policy as it is, as if sampled from another one: ratios leave the clipping range."""
    engine = TinkerEngine(remote)
    engine.publish(1)
    return blurred(sampled(engine, remote), 0.4)


def sampled(engine, backend):
    prompts = [np.array(backend.tokenizer.encode(text)) for text in ("What is 4 + 5?", "2 + 2 =")]
    groups = engine.generate(prompts, np.arange(8, dtype=np.uint64).reshape(2, 4), max_tokens=12, temperature=1.0)
    rng = np.random.default_rng(0)
    found = models.random_batch(0, [1, 1], [[1] * 4, [1] * 4])
    rollouts = [
        dataclasses.replace(
            blank,
            tokens_T=completion.tokens_T,
            logprobs_T=completion.logprobs_T,
            planning_T=rng.random(len(completion.tokens_T)) < 0.3,
        )
        for blank, completion in zip(found.rollouts, [c for group in groups for c in group], strict=True)
    ]
    return dataclasses.replace(found, prompts=tuple(prompts), rollouts=tuple(rollouts))


def blurred(batch, scale):
    rng = np.random.default_rng(1)
    logprobs = [np.minimum(r.logprobs_T + rng.normal(0, scale, len(r.logprobs_T)), -1e-4) for r in batch.rollouts]
    return models.with_logprobs(batch, logprobs)


def open_twin(config, folder):
    """The service's adapter, saved in `folder`, in this process. Its alpha is 32."""
    lora = config.lora.model_copy(update={"alpha": 32})
    local = LocalBackend(config.model_copy(update={"lora": lora}), seed=0, say=lambda line: None)
    local.load_adapter(folder)
    return local


@pytest.fixture(scope="module")
def adapter(remote, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    remote.save_adapter(folder)
    return folder


def test_the_adapter_that_is_downloaded_is_the_policy(remote, adapter):
    local, engine = open_twin(config_of(), adapter), TinkerEngine(remote)
    engine.publish(1)
    fresh = sampled(engine, remote)
    for i, rollout in enumerate(fresh.rollouts):
        prompt = fresh.prompts[rollout.group]
        assert local.logprobs(prompt, rollout.tokens_T) == pytest.approx(rollout.logprobs_T, abs=1e-4)
        if i == 0:
            assert remote.logprobs(prompt, rollout.tokens_T) == pytest.approx(rollout.logprobs_T, abs=1e-4)


def both(remote, adapter, batch, monkeypatch, **overrides):
    """Metrics of a step, here and there, that changes nothing: its learning rate is 0."""
    config = config_of(training__lr=0.0, **overrides)
    ours = open_twin(config, adapter).step(batch, 0)
    monkeypatch.setattr(remote, "config", at_service(config, remote.config.model.base_url))
    theirs = remote.step(batch, 0)
    assert theirs.metrics["loss"] == pytest.approx(ours.metrics["loss"], abs=1e-4)
    # The norm of the gradient is the service's own: it sees the reduction, which a report of the loss does not. This
    # service shares one matrix A between gate and up, so that it is not quite the same; see `test_the_same_update`.
    assert theirs.metrics["grad_norm"] == pytest.approx(ours.metrics["grad_norm"], rel=0.02)
    return ours.metrics, theirs.metrics


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean", "constant"])
@pytest.mark.parametrize("kind", ["importance_sampling", "ppo", "cispo"])
def test_the_same_loss_and_gradient(kind, aggregation, remote, adapter, batch, monkeypatch):
    ours, theirs = both(remote, adapter, batch, monkeypatch, loss__kind=kind, loss__aggregation=aggregation)
    for key in ("ratio_mean", "clip_fraction", "logprob_gap_mean", "logprob_gap_max", "planning_fraction"):
        assert theirs[key] == pytest.approx(ours[key], abs=1e-4), key
    if kind != "importance_sampling":
        assert theirs["clip_fraction"] > 0.1


def test_the_same_credit(remote, adapter, monkeypatch):
    """On policy: off it, the surprisal of the sampler, which is all that a service gives, is not the trainer's."""
    engine = TinkerEngine(remote)
    engine.publish(2)
    batch = dataclasses.replace(sampled(engine, remote), sepa_lambda=0.4)
    ours, theirs = both(remote, adapter, batch, monkeypatch, algorithm__transform_mode="gtpo_sepa_hicra")
    assert theirs["exec_uncertainty_var"] == pytest.approx(ours["exec_uncertainty_var"], rel=1e-3)


@pytest.mark.parametrize("kind", ["importance_sampling", "ppo", "cispo"])
def test_the_loss_that_the_service_reports(kind, remote, batch):
    """Its own figures, token by token, under its own reduction."""
    config = config_of(loss__kind=kind)
    update = prepare(batch, range(8), config, uncertainty="surprisal", reduction="sequence_mean")
    sent = [wire.datum(datum, with_weights=True) for datum in update.datums]
    answer = remote.service.wait(remote.training.forward(sent, kind, wire.loss_config(config.loss)))
    means = [
        (output["elementwise_loss"].to_numpy() * datum.weights).sum() / datum.weights.sum()
        for output, datum in zip(answer.loss_fn_outputs, update.datums, strict=True)
    ]
    sums, _ = measured(update, wire.logprobs(answer), config)
    assert np.mean(means) == pytest.approx(sums["loss"], abs=1e-4)


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean"])
def test_the_same_update(aggregation, server, tmp_path):
    """One update of Adam, its first on either side, from the same adapter: the same policy afterwards."""
    config = config_of(training__weight_decay=0.1, loss__aggregation=aggregation)
    fresh = TinkerBackend(at_service(config, server), seed=6, say=lambda line: None)
    engine = TinkerEngine(fresh)
    batch = sampled(engine, fresh)
    fresh.save_adapter(tmp_path)
    local = open_twin(config, tmp_path)
    before = local.logprobs(batch.prompts[0], batch.rollouts[0].tokens_T)
    ours, theirs = local.step(batch, 0), fresh.step(batch, 0)
    # B is zero, so that there is no gradient of the shared matrix yet.
    assert theirs.metrics["grad_norm"] == pytest.approx(ours.metrics["grad_norm"], rel=1e-3)
    engine.publish(1)
    moved = sampled(engine, fresh)
    engine.close()
    assert abs(local.logprobs(batch.prompts[0], batch.rollouts[0].tokens_T) - before).max() > 0.01
    for rollout in moved.rollouts[::3]:
        expected = local.logprobs(moved.prompts[rollout.group], rollout.tokens_T)
        assert expected == pytest.approx(rollout.logprobs_T, abs=2e-3)
