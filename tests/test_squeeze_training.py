"""Squeezing in the course of a training: the function, the optimizer, and a resume across it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny_models as models
from retrain import load_config
from retrain.backend import ranks
from retrain.inference.pytorch import PyTorchEngine
from retrain.squeeze.lowrank import decompose, truncate
from retrain.training.run import train
from retrain.training.squeezing import rank_after
from retrain.types import RetrainError
from runs import assert_same_run, lines, write_config
from squeeze_adapters import truncated

BATCH = models.random_batch(3, [5, 3], [[4, 6], [5]])
SQUEEZED = """
[squeeze]
at_steps = [2, 4]
to_ranks = [3, 1]
"""


def layers(backend):
    return dict(ranks._layers(backend.policy))


def deltas(backend):
    return {name: layer.get_delta_weight("default").detach().double() for name, layer in layers(backend).items()}


def logprobs(backend):
    return np.concatenate([backend.logprobs(BATCH.prompts[r.group], r.tokens_T) for r in BATCH.rollouts])


@pytest.mark.parametrize("overrides", [{}, {"lora__use_rslora": True, "lora__alpha": 3}], ids=["lora", "rslora"])
@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_the_policy_becomes_the_truncated_one(open_local, kind, overrides):
    """Log-probs after it equal those of a base with the truncated products merged in, adapter off."""
    backend = open_local(kind, float64=True, **overrides)
    before, plain = deltas(backend), logprobs(backend)
    names = {name: layer.get_base_layer().weight for name, layer in layers(backend).items()}
    expected = {name: truncated(delta, 2) for name, delta in before.items()}
    kept = backend.squeeze(2)
    found = deltas(backend)
    for name, delta in before.items():
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12)
        lost = ((delta - expected[name]).norm() / delta.norm()).item() ** 2
        assert kept[name] == pytest.approx(1 - lost, abs=1e-6)
    squeezed = logprobs(backend)
    with torch.no_grad():
        for name, weight in names.items():
            weight += expected[name]
        reference = np.concatenate(
            [backend.logprobs(BATCH.prompts[r.group], r.tokens_T, adapter=False) for r in BATCH.rollouts]
        )
    np.testing.assert_allclose(squeezed, reference, rtol=0, atol=1e-6)
    assert np.abs(squeezed - plain).max() > 1e-3


def test_every_engine_samples_from_the_squeezed_policy(open_local):
    """Published again, the engine's log-probs are the squeezed policy's: nothing of the old rank is kept anywhere."""
    for merged in (True, False):
        backend = open_local("qwen3")
        engine = PyTorchEngine(backend.policy, merged_copy=merged)
        engine.publish(0)
        backend.squeeze(2)
        engine.publish(1)
        streams = np.arange(2, dtype=np.uint64)[None]
        ((completion, _),) = engine.generate([BATCH.prompts[0]], streams, max_tokens=8, temperature=1.0)
        expected = backend.logprobs(BATCH.prompts[0], completion.tokens_T)
        np.testing.assert_allclose(completion.logprobs_T, expected, rtol=0, atol=1e-4)


def test_moments_are_those_of_the_new_factors_gradients(open_local):
    """Gradients as moments: projected, they are the gradients that autograd gives the new factors."""
    backend = open_local("qwen3", float64=True, lora__use_rslora=True)
    optimizer = backend.learner.optimizer

    # The gradient of dW, the same for the old factors and the new.
    generator = torch.Generator().manual_seed(0)
    for layer in layers(backend).values():
        a, b = ranks._factors(layer)
        slope = torch.randn(b.shape[0], a.shape[1], generator=generator, dtype=torch.float64)
        scale = layer.scaling["default"]
        ((scale * b @ a) * slope).sum().backward()
        for parameter in (a, b):
            optimizer.state[parameter] = {
                "step": torch.tensor(5.0),
                "exp_avg": parameter.grad.clone(),
                "exp_avg_sq": parameter.grad.square(),
            }
            parameter.grad = None
        layer.slope = slope
    before = {name: ranks._factors(layer) for name, layer in layers(backend).items()}
    squares = {name: [optimizer.state[p]["exp_avg_sq"].clone() for p in pair] for name, pair in before.items()}
    old = {name: [p.detach().clone() for p in pair] for name, pair in before.items()}
    backend.squeeze(2)
    for name, layer in layers(backend).items():
        a, b = ranks._factors(layer)
        assert (a, b) == before[name] and a.shape[0] == b.shape[1] == 2
        ((layer.scaling["default"] * b @ a) * layer.slope).sum().backward()
        for parameter in (a, b):
            state = optimizer.state[parameter]
            torch.testing.assert_close(state["exp_avg"], parameter.grad, rtol=1e-9, atol=1e-9)
            assert state["step"] == 5
            assert (state["exp_avg_sq"] > 0).all()
        # The second moments, entry by entry, as the docstring has them.
        small = truncate(decompose(old[name][1][None], old[name][0][None]), 2)
        for i in range(2):
            weights = small.by_b_ERK[0, :, i] ** 2
            torch.testing.assert_close(optimizer.state[a]["exp_avg_sq"][i], weights @ squares[name][0])
            weights = small.by_a_EKR[0, i] ** 2
            torch.testing.assert_close(optimizer.state[b]["exp_avg_sq"][:, i], squares[name][1] @ weights)


def test_training_goes_on_and_learns(open_local):
    """The same batch again and again: its loss falls on after the squeeze, which costs less than was learned."""
    backend = open_local("qwen3", stir=False, training__lr=1e-3, model__lora_rank=8)
    batch = models.with_logprobs(BATCH, np.split(logprobs(backend), [4, 10]))
    losses = [backend.step(batch, step).metrics["loss"] for step in range(8)]
    backend.squeeze(2)
    losses += [backend.step(batch, step).metrics["loss"] for step in range(8, 16)]
    assert losses[7] < losses[0]
    assert losses[8] < losses[0]
    assert losses[15] < losses[7]


def test_a_checkpoint_across_a_squeeze(open_local, tmp_path):
    """Saved after the squeeze, loaded into a fresh backend of the full rank: the next step is the same bit for bit."""
    options = {"lora__dropout": 0.3, "training__lr": 0.01, "lora__use_rslora": True, "lora__alpha": 5, "stir": False}
    backend = open_local("qwen3", **options)
    batch = models.with_logprobs(BATCH, [logprobs(backend)[:4], logprobs(backend)[4:10], logprobs(backend)[10:]])
    backend.step(batch, 0)
    backend.squeeze(3)
    backend.step(batch, 1)
    backend.save(tmp_path)
    fresh = open_local("qwen3", **options)
    for one in (backend, fresh):
        one.load(tmp_path)
        one.step(batch, 2)
        one.squeeze(1)
        one.step(batch, 3)
    for name, layer in layers(backend).items():
        other = layers(fresh)[name]
        assert layer.scaling == other.scaling
        for mine, theirs in zip(ranks._factors(layer), ranks._factors(other), strict=True):
            assert torch.equal(mine, theirs)
    mine, theirs = (one.policy.peft.peft_config["default"] for one in (backend, fresh))
    assert (mine.r, mine.lora_alpha) == (theirs.r, theirs.lora_alpha) == (1, pytest.approx(5 / 4**0.5))


def test_a_checkpoint_without_an_adapter(open_local, tmp_path):
    backend = open_local("qwen3")
    with pytest.raises(RetrainError, match=r"there is no adapter_config\.json"):
        backend.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(RetrainError, match="is damaged"):
        backend.load(tmp_path)


def test_ranks_by_step(tmp_path):
    config = load_config(write_config(tmp_path, tmp_path / "run", SQUEEZED))
    assert [rank_after(config, step) for step in range(7)] == [4, 4, 3, 3, 1, 1, 1]
    assert rank_after(load_config(write_config(tmp_path, tmp_path / "run")), 6) == 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is squeezed twice."""
    folder = tmp_path_factory.mktemp("whole")
    # Without dropout: the trainer would compute another policy than the one that sampled.
    overrides = {"training.keep_checkpoints": 0, "lora.dropout": 0.0}
    config = load_config(write_config(folder, folder / "run", SQUEEZED, learns=True), overrides)
    train(config)
    return folder / "run"


def test_metrics_and_the_final_adapter(whole):
    rows = lines(whole / "metrics.jsonl")
    assert sum(row["num_datums"] > 0 for row in rows) >= 3
    assert [row["lora_rank"] for row in rows] == [4, 3, 3, 1, 1, 1]
    assert [row["squeeze_variance"] is not None for row in rows] == [False, True, False, True, False, False]
    assert all(0 < row["squeeze_variance"] <= 1 for row in rows if row["squeeze_variance"] is not None)
    # A squeezed policy is another version, and what is sampled from it is what trains.
    squeezed = [row for row in rows if row["squeeze_variance"] is not None]
    assert rows[-1]["policy_version"] == sum(row["num_datums"] > 0 for row in rows) + len(squeezed)
    assert all(row["logprob_gap_max"] < 1e-4 for row in rows if row["num_datums"])
    assert ranks.read_config(whole / "final")["r"] == 1
    assert ranks.read_config(whole / "final")["lora_alpha"] == 2
    found = [ranks.read_config(whole / f"checkpoints/step_{step:06}")["r"] for step in (0, 2, 4, 6)]
    assert found == [4, 3, 1, 1]


@pytest.mark.parametrize("step", [0, 2, 4])
def test_resumed_from_any_checkpoint_it_is_the_same_run(whole, tmp_path, step):
    source = whole / f"checkpoints/step_{step:06}"
    overrides = {"resume.from": str(source), "logging.log_dir": str(tmp_path / "run")}
    train(load_config(whole / "config.toml", overrides))
    assert_same_run(whole, tmp_path / "run")
