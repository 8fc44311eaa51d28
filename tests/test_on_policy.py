"""With both engines ours, what samples is what trains: the ratio of the first update is 1, and the base never moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import retrain
import runs
from retrain.backend.model import base_digest
from retrain.inference.pytorch import PyTorchEngine
from retrain.types import Batch, Rollout

CYCLES = 1000
EPS = torch.finfo(torch.float32).eps
PROMPTS = [np.arange(2, 2 + n) for n in (3, 17, 8)]
STREAMS = np.arange(12, dtype=np.uint64).reshape(3, 4)


def move(policy, generator, scale=0.2):
    """Another adapter, as after a step."""
    with torch.no_grad():
        for parameter in policy.adapter_parameters():
            parameter.normal_(0, scale, generator=generator)


def rollouts(engine, temperature, max_tokens=20):
    answers = engine.generate(PROMPTS, STREAMS, max_tokens=max_tokens, temperature=temperature)
    return Batch(
        tuple(PROMPTS),
        tuple(
            Rollout(p, c.tokens_T, c.logprobs_T, (-1.0) ** g, np.zeros(len(c), dtype=bool))
            for p, group in enumerate(answers)
            for g, c in enumerate(group)
        ),
    )


# ---- the ratio ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_with_a_model_in_float64_the_gap_is_the_samplers_softmax(kind, open_local):
    """It is float32, and so is what a completion records; nothing else is between sampler and trainer."""
    backend = open_local(kind, float64=True, training__temperature=0.9, loss__kind="ppo")
    engine = PyTorchEngine(backend.policy, merged_copy=False)
    move(backend.policy, torch.Generator().manual_seed(1))
    engine.publish(1)
    batch = rollouts(engine, 0.9)
    metrics = backend.step(batch, 0).metrics
    largest = max(np.abs(r.logprobs_T).max() for r in batch.rollouts)
    assert 0 < metrics["logprob_gap_max"] <= 4 * EPS * max(largest, 1)
    assert abs(metrics["ratio_mean"] - 1) <= EPS * max(largest, 1)
    assert metrics["clip_fraction"] == 0


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_ratio_clipping_and_kl_of_the_first_update(kind, merged, open_local):
    """In float32: each published adapter is sampled from within its rounding, through a forward of two layers."""
    backend = open_local(kind, training__temperature=0.9, loss__kind="ppo", training__lr=0.0)
    engine = PyTorchEngine(backend.policy, merged_copy=merged)
    for version in range(1, 4):
        move(backend.policy, torch.Generator().manual_seed(version))
        engine.publish(version)
        batch = rollouts(engine, 0.9)
        metrics = backend.step(batch, version).metrics
        assert metrics["logprob_gap_max"] < 1e-4
        assert abs(metrics["ratio_mean"] - 1) < 1e-5
        assert metrics["clip_fraction"] == 0
        d = np.concatenate(
            [
                backend.logprobs(PROMPTS[r.group], r.tokens_T, temperature=0.9).astype(float) - r.logprobs_T
                for r in batch.rollouts
            ]
        )
        assert abs(d.mean()) < 1e-5  # estimator k1 of the KL to the sampler
        assert abs((np.exp(d) - d - 1).mean()) < 1e-9  # k3, which is of second order


def test_a_stale_copy_would_show(open_local):
    """What the tests above rule out: the same, with the adapter published one step ago."""
    backend = open_local("qwen3", training__temperature=0.9, loss__kind="ppo")
    engine = PyTorchEngine(backend.policy)
    move(backend.policy, torch.Generator().manual_seed(1))
    engine.publish(1)
    move(backend.policy, torch.Generator().manual_seed(2))
    metrics = backend.step(rollouts(engine, 0.9), 0).metrics
    assert metrics["logprob_gap_max"] > 0.1 and metrics["clip_fraction"] > 0


def test_of_a_run(tmp_path):
    """Recomputed old log-probs make the ratio 1 exactly, in every step; the sampler's own, to rounding."""
    for old, tolerance in (("recompute", 0.0), ("sampler", 1e-5)):
        log_dir = tmp_path / old
        loss = f'[loss]\nkind = "ppo"\nold_logprobs = "{old}"\n'
        config = retrain.load_config(
            runs.write_config(tmp_path, log_dir, loss),
            {"training.max_steps": 3, "lora.dropout": 0.0, "algorithm.skip_uniform_groups": False},
        )
        retrain.train(config)
        for row in runs.lines(log_dir / "metrics.jsonl"):
            assert row["num_datums"] == row["batch_size"] * row["group_size"]
            assert abs(row["ratio_mean"] - 1) <= tolerance
            assert row["clip_fraction"] == 0 and row["logprob_gap_max"] < 1e-4


# ---- the base -----------------------------------------------------------------------------------------------------


def copied(engine) -> list[torch.Tensor]:
    """The tensors of the sampling copy, in their order."""
    decoder = engine.decoder
    if hasattr(decoder, "copied"):
        return list(decoder.copied.lm.parameters())
    projections = [p for layer in decoder.layers for p in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    weights = [weight for p in (*projections, decoder.head) for weight, _ in p.parts]
    return [weight.to_dense() if weight.is_mkldnn else weight for weight in weights]


@pytest.mark.parametrize(("kind", "dtype"), [("qwen3", "fp32"), ("qwen3", "bf16"), ("gpt2", "bf16")])
def test_after_a_thousand_publications_the_base_is_what_it_was(kind, dtype, open_local):
    policy = open_local(kind, training__dtype=dtype).policy
    before = base_digest(policy)
    engine, generator = PyTorchEngine(policy), torch.Generator().manual_seed(0)
    for version in range(CYCLES):
        move(policy, generator)
        engine.publish(version)
    assert base_digest(policy) == before
    fresh = PyTorchEngine(policy)
    assert len(copied(engine)) > 8
    for ours, new in zip(copied(engine), copied(fresh), strict=True):
        assert torch.equal(ours, new)
    got, want = (rollouts(e, 1.0).rollouts for e in (engine, fresh))
    assert all(np.array_equal(a.tokens_T, b.tokens_T) for a, b in zip(got, want, strict=True))
    assert all(np.array_equal(a.logprobs_T, b.logprobs_T) for a, b in zip(got, want, strict=True))


def test_merging_into_the_weights_and_out_again_would_show(open_local):
    """The way of others, for comparison: the digest sees it after a few cycles already."""
    policy = open_local("gpt2", training__dtype="bf16").policy
    before, generator = base_digest(policy), torch.Generator().manual_seed(0)
    for _ in range(10):
        move(policy, generator)
        policy.peft.merge_adapter()
        policy.peft.unmerge_adapter()
    assert base_digest(policy) != before


def test_the_digest_sees_one_bit(open_local):
    policy = open_local("qwen3").policy
    before = base_digest(policy)
    name, parameter = policy.base_parameters()[5]
    flat = parameter.data.flatten()
    flat[3] = torch.nextafter(flat[3], torch.tensor(torch.inf))
    assert name and base_digest(policy) != before


def test_adapters_come_and_go_with_resumes(open_local, tmp_path):
    """Saved and loaded over and over, an adapter is not added twice."""
    backend = open_local("llama")
    engine = PyTorchEngine(backend.policy)
    engine.publish(1)
    want = rollouts(engine, 1.0)
    backend.save(tmp_path)
    for version in range(5):
        backend.load(tmp_path)
        engine.publish(version)
    again = rollouts(engine, 1.0)
    for a, b in zip(want.rollouts, again.rollouts, strict=True):
        assert np.array_equal(a.logprobs_T, b.logprobs_T)
