"""Fixtures shared by the tests: tiny models on disk, and backends on them."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# Triton reads this when it is first imported. Without a GPU the kernels are interpreted; with one they are compiled.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import tiny_models as models

# HYPOTHESIS_PROFILE=long tries far more cases; see `learner_cases` for those that say how many they need.
settings.register_profile("long", max_examples=5000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # Tiny tensors: more threads only contend.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Folder of the tiny model of a kind of `tiny_models.CONFIGS`."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = models.save_model(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


@pytest.fixture
def open_local(model_folder):
    """A LocalBackend on a tiny model, its adapter stirred; `section__key` overrides its config."""
    from retrain.backend.learner import Learner
    from retrain.backend.local import LocalBackend

    def open_backend(kind="qwen3", *, seed=0, stir=True, float64=False, **overrides):
        config = models.config_for(model_folder(kind), **overrides)
        backend = LocalBackend(config, seed=seed, say=lambda line: None)
        if stir:
            models.stir(backend.policy.peft)
        if float64:
            models.in_float64(backend.policy.peft)
            backend.learner = Learner(backend.policy, config)
        return backend

    return open_backend
