"""Run as a program: one training step with little memory left, and the same step with the budget that it found.

Prints that budget and the digests of the two adapters.
"""

from __future__ import annotations

import hashlib
import resource
import sys
from pathlib import Path

import torch

import tiny_models as models
from retrain.backend.local import LocalBackend


def open_backend(budget: int) -> LocalBackend:
    overrides = {"training__micro_batch_tokens": budget, "lora__dropout": 0.1, "training__lr": 1e-3}
    return LocalBackend(models.config_for("builtin:tiny", **overrides), seed=0, say=lambda line: None)


def digest(backend: LocalBackend) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in backend.learner.parameters)).hexdigest()


def main(room: int) -> None:
    """room: bytes."""
    torch.set_num_threads(1)
    batch = models.random_batch(1, [20] * 4, [[150] * 4] * 4)
    for rollout in batch.rollouts:
        rollout.tokens_T[:] %= 200  # of the embedded model's vocabulary
    backend = open_backend(16384)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
    budget = backend.step(batch, 0).metrics["micro_batch_tokens"]
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert budget is not None
    other = open_backend(int(budget))
    other.step(batch, 0)
    print(budget, digest(backend), digest(other))


if __name__ == "__main__":
    main(int(sys.argv[1]) << 20)
