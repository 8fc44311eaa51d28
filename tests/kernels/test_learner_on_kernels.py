"""The engine on the Triton kernels: an optimizer step is that of the references, within float32 rounding."""

from __future__ import annotations

import pytest
import torch

import tiny_models as models
from retrain_kernels import dispatch

CASES = [
    {"algorithm__transform_mode": "gtpo_sepa_hicra"},
    {"loss__kind": "ppo", "loss__dual_clip": 3.0},
    {"loss__kind": "gspo", "loss__aggregation": "seq_mean", "loss__kl_coef": 0.1, "loss__entropy_coef": 0.01},
    {"loss__kind": "cispo", "loss__aggregation": "constant", "loss__old_logprobs": "recompute"},
]


@pytest.mark.parametrize("overrides", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_a_step_on_the_kernels_is_the_step_on_the_references(open_local, monkeypatch, overrides):
    results = {}
    for implementation in ("reference", "triton"):
        asked = []

        def resolve(impl, device, *, float64=False, implementation=implementation, asked=asked):
            asked.append(impl)
            return implementation

        monkeypatch.setattr(dispatch, "resolve", resolve)
        backend = open_local("qwen3", **overrides)
        batch = models.random_batch(0, [3, 11, 6], [[5, 1, 9, 2], [4, 4, 12], [7, 3]], sepa_lambda=0.4)
        metrics = backend.step(batch, 0).metrics
        assert set(asked) == {"auto"}
        results[implementation] = metrics, torch.cat([p.grad.flatten() for p in backend.learner.parameters])
    (want_metrics, want), (metrics, got) = results["reference"], results["triton"]
    assert (got - want).norm() <= 2e-6 * want.norm()
    for key, value in want_metrics.items():
        assert metrics[key] == (None if value is None else pytest.approx(value, rel=1e-5, abs=1e-7)), key
